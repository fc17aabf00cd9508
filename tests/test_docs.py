"""README and docs are true: links lead somewhere, commands parse, examples run, names exist. No docs tool is needed."""

import functools
import importlib
import itertools
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from chela.cli.commands import COMMANDS, resolve, training
from chela.cli.parse import call, options
from chela.config import ModelConfig, OptimConfig, RunConfig
from chela.data import TASKS
from chela.presets import PRESETS

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
SPOKEN = (["chela", "--help"], ["chela", "--version"], ["chela", "train", "--help"])  # `main` answers them itself


def named(path):
    return str(path.relative_to(ROOT))


def prose(page):
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page, language):
    return [body for _, kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def inline_code(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def rows(page, heading):
    """Cells of the first table under a heading."""
    text = "\n" + page.read_text(encoding="utf-8")
    lines = text.split(f"\n{heading}\n", 1)[1].splitlines()
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), lines)
    table = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table][2:]


def slug(heading):
    """The anchor that Markdown tools give a heading."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())


def anchors(page):
    return {slug(line.lstrip("#")) for line in prose(page).splitlines() if line.startswith("#")}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert page not in DOCS or ROOT / "docs" in target.parents, f"{link} leaves the built site"
        assert not anchor or anchor in anchors(target), link


def command_lines():
    found = []
    for page in PAGES:
        lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
        words = [shlex.split(line, comments=True) for line in lines]
        words += [shlex.split(code) for code in inline_code(page) if code.startswith("chela ")]
        found += [pytest.param(w, id=f"{named(page)}: {shlex.join(w)}") for w in words if w]
    return found


@pytest.mark.parametrize("words", command_lines())
def test_commands_exist(words):
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):.*  ## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    if words[0] != "chela":
        assert words[0] in ("pip", "uv", ".venv/bin/python"), words
        return
    if words in SPOKEN:
        return
    command, rest, name = resolve(words[1:])
    seen = []

    @functools.wraps(command)
    def record(*args, **kwargs):
        seen.append((args, kwargs))

    if "--help" in rest:
        with pytest.raises(SystemExit, match=r"^0$"):
            call(record, rest, name)
    else:
        call(record, rest, name)
        assert seen


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_options_exist(page):
    known = {option for command in [*COMMANDS.values(), training(RunConfig())] for option in options(command)}
    known |= {"--help", "--version", "--nproc-per-node"}
    for code in inline_code(page):
        for option in re.findall(r"(?<!\S)(--[a-z][a-z_.-]*[a-z])(?=$|[\s=])", code):
            plain = option.replace(".no-", ".").replace("--no-", "--")
            assert plain in known, code


@pytest.mark.parametrize(
    "code",
    [pytest.param(code, id=f"{named(page)} {n}") for page in PAGES for n, code in enumerate(blocks(page, "python"))],
)
def test_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_the_readme_is_short_and_its_example_has_twelve_lines():
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 150
    (example,) = blocks(readme, "python")
    assert len(example.splitlines()) == 12
    assert "assert " in example


def test_every_preset_and_task_is_described():
    presets = rows(ROOT / "docs" / "training.md", "## Presets")
    assert {row[0].strip("`") for row in presets} == set(PRESETS)
    tasks = [row[0] for row in rows(ROOT / "docs" / "data.md", "# Data")]
    assert set(re.findall(r"`([^`]+)`", " ".join(tasks))) == set(TASKS)


def test_open_choices_have_the_defaults_they_are_said_to_have():
    model, optim = ModelConfig(), OptimConfig()
    words = {True: "on", False: "off"}
    table = rows(ROOT / "docs" / "method.md", "## Open choices")
    assert len(table) >= 15
    for _, argument, said, _ in table:
        name = argument.strip("`")
        if name == "optim.kernel_lr":
            assert optim.kernel_lr == 0
            assert said == "that of the rest"
        elif name == "prenorm":
            assert said == {True: "before", False: "after"}[model.prenorm]
        else:
            value = getattr(model, name)
            text = words[value] if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
            text = ", ".join(map(str, text)) if isinstance(text, tuple) else str(text)
            assert said.strip("`") == text, name
    told = {row[1].strip("`") for row in table}
    shape = {"kind", "inputs", "vocab", "channels", "classes", "layers", "d_model", "causal", "merged"}
    assert {f.name for f in fields(ModelConfig)} - shape <= told


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_tests_that_are_named_exist(page):
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    for code in inline_code(page):
        match = re.fullmatch(r"(?:(?:tests/)?(test_\w+\.py))?(?:::)?(test_\w+)?", code)
        if not match or not code.startswith(("test_", "tests/")):
            continue
        file, test = match.groups()
        assert file is None or file in sources, code
        held = sources.values() if file is None else [sources[file]]
        assert test is None or any(f"def {test}(" in text for text in held), code


@pytest.mark.parametrize("page", DOCS, ids=named)
def test_documented_objects_exist(page):
    for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        module, _, name = path.rpartition(".")
        thing = getattr(importlib.import_module(module), name)
        assert thing.__doc__, path
        assert callable(thing), f"{path} is no function or class"


def test_the_site_has_every_page_once():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^  - .+: (\S+\.md)$", settings, re.MULTILINE)) == [page.name for page in DOCS]
