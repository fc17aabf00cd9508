import io
import json
import re
import statistics
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from chela.config import RunConfig
from chela.evaluation import curves, page, write_report
from chela.evaluation.axes import Against, Scale, axis
from chela.evaluation.charts import charts, write_pictures
from chela.evaluation.page import Cell
from chela.evaluation.results import show
from chela.evaluation.runs import Run, group, read_run
from chela.presets import preset
from chela.record import save_toml

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Balanced(HTMLParser):
    """Fails on an element that is closed out of order or not at all; collects text and attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [(name, value) for name, value in attrs if name in ("href", "src", "srcset", "data", "action")]

    def handle_startendtag(self, tag, attrs):
        self.links += [(name, value) for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def parse(text: str) -> Balanced:
    found = Balanced()
    found.feed(text)
    assert not found.open
    return found


def write_run(folder: Path, config: RunConfig, accuracy: float | None, **start) -> Path:
    """A run of 20 steps as its folder would record it; without an accuracy it is not finished."""
    folder.mkdir()
    save_toml(config, folder / "config.toml")
    facts = {"parameters": 1234, "device": "cpu (x86_64)", "torch": "2", "chance_loss": 2.3, "processes": 1}
    lines: list[dict] = [{"kind": "start", "step": 0, **facts, **start}]
    for step in (10, 20):
        lines.append({"kind": "train", "step": step, "loss": 2.0 - step / 20, "accuracy": 0.5})
        lines.append({"kind": "val", "step": step, "accuracy": step / 40, "loss": 1.0, "seconds": 6.0 * step})
    if accuracy is not None:
        result = {"accuracy": accuracy, "loss": 1.0, "count": 100}
        lines.append({"kind": "test", "step": 20, "baselines": {"majority class": 0.1}, **result})
        lines.append({"kind": "end", "step": 20, "status": "done", "test": result, "seconds": 180.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def three(tmp_path):
    """Three seeds of one configuration."""
    runs = zip((0, 1, 2), (0.91, 0.93, 0.98), strict=True)
    return [write_run(tmp_path / f"seed{s}", replace(preset("digits"), seed=s), accuracy) for s, accuracy in runs]


def read(folders, tmp_path) -> str:
    return write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table."""
    return [
        [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)]
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", text, re.DOTALL)
    ]


def test_a_run_of_minutes_has_no_number_of_steps_to_reach(three, tmp_path):
    timed = replace(preset("digits"), train=replace(preset("digits").train, minutes=2.5))
    folder = write_run(tmp_path / "timed", timed, 0.94)
    assert ("steps in 2.5 min" in read([folder], tmp_path), "steps of" in read([folder], tmp_path)) == (True, False)
    assert "steps of 1,000" in read(three[:1], tmp_path)


def test_runs_of_one_seed_count_once(three, tmp_path):
    again = write_run(tmp_path / "again", replace(preset("digits"), seed=2), 0.94)
    (line,) = [row for row in rows(read([*three, again], tmp_path)) if row[0] == "digits"]
    assert line[2] == f"{statistics.mean((91, 93, 96)):.2f} ± {statistics.stdev((91, 93, 96)):.2f} %"


def test_mean_and_deviation_over_seeds(three, tmp_path):
    table = rows(read(three, tmp_path))
    values = [91.0, 93.0, 98.0]
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    (line,) = [row for row in table if row[0] == "digits"]
    assert line[1] == "3 of 3 done"
    assert line[2] == f"{mean:.2f} ± {deviation:.2f} %" == "94.00 ± 3.61 %"
    assert "1,234" in line
    assert "3.0" in line, "180 seconds are 3 minutes"
    for seed, value in enumerate(values):
        (line,) = [row for row in table if row[0] == f"seed {seed}"]
        assert line[1:3] == ["done", f"{value:.2f} %"]
    assert ["majority class", "baseline", "10.00 %"] in [row[:3] for row in table]


def test_the_page_stands_alone(three, tmp_path):
    text = read(three, tmp_path)
    found = parse(text)
    assert text.startswith("<!doctype html>")
    assert all(value.startswith("#") for _, value in found.links), "nothing is loaded from elsewhere"
    assert not re.search(r"<script|@import|url\((?!#)|<link|<iframe", text)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "the name of SVG is no address that is visited"


def test_the_same_runs_give_the_same_page_and_it_is_written_whole(three, tmp_path):
    first = read(three, tmp_path)
    assert read(three, tmp_path) == first
    assert not list(tmp_path.glob("*.tmp"))


def test_curves_of_every_run(three, tmp_path):
    text = read(three, tmp_path)
    assert text.count("<svg") == 4, "each against steps, and against the minutes of the clock"
    assert "Training loss (nats)" in text
    assert "Validation accuracy" in text
    assert text.count(f"stroke: {curves.colour(0)}") >= 6, "three runs in two charts"


def test_a_curve_of_one_point_is_seen_whole_at_the_edge():
    point = curves.Line(curves.colour(0), [3.0], [1.0])
    assert not re.search(r"<g clip-path[^>]*>\s*<use", curves.draw(curves.Chart("Loss", [point], 3, {})))


def test_without_matplotlib_the_page_says_what_to_install(three, tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "available", lambda: False)
    text = read(three, tmp_path)
    assert "<svg" not in text
    assert "chela[plot]" in text
    assert "94.00 ± 3.61 %" in text


def test_what_differs_between_configurations(three, tmp_path):
    config = preset("digits")
    other = replace(config, model=replace(config.model, attention=False), train=replace(config.train, keep=9))
    three.append(write_run(tmp_path / "without", other, 0.5))
    text = read(three, tmp_path)
    table = rows(text)
    names = [row[0] for row in table]
    assert "digits, model.attention False, seed 0" in names, "in the results, a single run with its seed"
    assert "digits, model.attention False" in names, "and in what differs"
    assert "model.attention was True, now False" in [cell for row in table for cell in row]
    assert "keep was" not in text, "what does not change the result is not named"
    assert "2 configurations" in text


def test_tasks_are_not_mixed(three, tmp_path):
    start = {"note": "published split"}
    three.append(write_run(tmp_path / "image", preset("image"), 0.8, **start))
    text = read(three, tmp_path)
    assert text.count("<svg") == 8
    assert "image: published split" in text
    assert [row[2] for row in rows(text) if row[0] == "image, seed 0"] == ["80.00 %"]


def test_unfinished_stopped_and_failed_runs_are_shown(tmp_path):
    config = preset("digits")
    write_run(tmp_path / "a", config, 0.9)
    write_run(tmp_path / "b", replace(config, seed=1), None)
    for seed, status, more in ((2, "stopped", {}), (3, "failed", {"message": "the loss became NaN, first in head"})):
        folder = write_run(tmp_path / str(seed), replace(config, seed=seed), None)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "end", "status": status, "step": 20, **more}) + "\n")
    text = read([tmp_path / name for name in "ab23"], tmp_path)
    (line,) = [row for row in rows(text) if row[0] == "digits"]
    assert line[1] == "1 of 4 done, 1 failed, 1 stopped, 1 unfinished"
    assert line[2] == "90.00 %", "the mean is over what is done"
    assert "digits, seed 3 failed at step 20: the loss became NaN, first in head" in text


def test_warnings_and_environment_are_shown(tmp_path):
    config = preset("digits")
    folder = write_run(tmp_path / "a", config, 0.9, commit="abc-dirty", device="cuda (H100)")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "warning", "step": 20, "message": "still at chance"}) + "\n")
    other = write_run(tmp_path / "b", replace(config, seed=1), 0.8, commit="def")
    text = read([folder, other], tmp_path)
    assert "digits, seed 0, step 20: still at chance" in text
    table = rows(text)
    assert ["commit", "abc-dirty", "a"] in table
    assert ["", "def", "b"] in table
    assert ["torch", "2", ""] in table
    assert not any(row[0] == "python" for row in table), "no run knows it"


def test_language_models_are_measured_in_bits(tmp_path):
    folder = write_run(tmp_path / "lm", preset("lm-tiny"), None)
    result = {"accuracy": 0.5, "loss": 1.0, "count": 9, "perplexity": 2.7, "bits_per_byte": 1.4427}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "val", "step": 20, **result}) + "\n")
        file.write(json.dumps({"kind": "end", "status": "done", "step": 20, "test": result, "seconds": 1.0}) + "\n")
    text = read([folder], tmp_path)
    assert "1.4427" in text
    assert "test bits per byte" in text


def test_a_single_run_has_its_numbers_on_top(three, tmp_path):
    text = read(three[:1], tmp_path)
    assert re.search(r"<b>91.00 %</b><span>test accuracy</span>", text)
    assert re.search(r"<b>10.00 %</b><span>baseline: majority class</span>", text)
    assert "chela train digits --seed 0" in text


def test_text_from_outside_is_escaped(tmp_path):
    config = replace(preset("digits"), preset="<script>alert(1)</script>")
    text = read([write_run(tmp_path / "a", config, 0.9, device='"><img src=x onerror=alert(1)>')], tmp_path)
    parse(text)
    assert "<script" not in text
    assert "<img" not in text
    for made in (page.table([Cell("<b>")], [("", [Cell("&<")])]), page.code(["<i>"]), page.section("<u>", "x")):
        assert not re.search(r"<[biu]>", made)


def test_a_page_that_cannot_be_written_leaves_the_old_one(three, tmp_path, monkeypatch):
    old = read(three, tmp_path)
    monkeypatch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match=r"cannot write .*page\.html: No space left on device"):
        write_report(three, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == old
    with pytest.raises(ValueError, match="name at least one run"):
        write_report([], tmp_path / "page.html")


def test_a_table_in_a_pipe_has_room_for_long_names(tmp_path):
    config = preset("digits")
    changed = replace(config, model=replace(config.model, kernel="multiscale"), optim=replace(config.optim, lr=1e-4))
    runs = [write_run(tmp_path / name, run, 0.9) for name, run in (("a", config), ("b", changed))]
    box = io.StringIO()
    show([read_run(run) for run in runs], Console(file=box, width=80))
    assert "digits, model.kernel multiscale, optim.lr 0.0001, seed 0" in box.getvalue()


def test_a_narrow_terminal_breaks_lines_and_leaves_out_no_number(tmp_path):
    run, narrow, wide = write_run(tmp_path / "a", preset("digits"), 0.9), io.StringIO(), io.StringIO()
    show([read_run(run)], Console(file=narrow, width=24, force_terminal=True, color_system=None))
    show([read_run(run)], Console(file=wide))
    words = [[word for word in box.getvalue().split() if "─" not in word] for box in (narrow, wide)]
    assert sorted(words[0]) == sorted(words[1])


def make_run(lines: list[tuple[str, dict]], **train) -> Run:
    """A language model's run of 2 x 8 tokens a step, with these lines in its journal."""
    start = preset("lm-tiny")
    config = replace(start, data=replace(start.data, max_length=8), train=replace(start.train, batch_size=2, **train))
    return Run(Path("run"), config, [{"kind": kind, **values} for kind, values in lines])


def known(runs: list[Run], against: Against) -> tuple[str, list[Scale]]:
    """The axis, which there must be."""
    found = axis(runs, against)
    assert found is not None
    return found


START = ("start", {"step": 0})


def test_tokens_and_minutes_are_the_journals_own_where_it_counts_them():
    lines = [
        START,
        ("train", {"step": 10, "loss": 1.0, "tokens_per_s": 1.0, "tokens": 150, "trained_seconds": 30.0}),
        ("val", {"step": 10, "seconds": 500.0, "trained_seconds": 30.0}),
        ("train", {"step": 20, "loss": 1.0, "tokens_per_s": 1.0, "tokens": 310, "trained_seconds": 90.0}),
        ("val", {"step": 20, "seconds": 900.0, "trained_seconds": 90.0}),
    ]
    label, (scale,) = known([make_run(lines)], "tokens")
    assert label == "tokens (millions)"
    assert scale.at([0, 10, 15, 20]) == pytest.approx([0, 150e-6, 230e-6, 310e-6])
    label, (scale,) = known([make_run(lines)], "minutes")
    assert label == "minutes of training"
    assert scale.at([0, 5, 10, 20]) == pytest.approx([0, 0.25, 0.5, 1.5])


def test_older_journals_give_minutes_by_their_rates_without_what_a_start_compiled():
    lines = [
        START,
        ("train", {"step": 10, "tokens_per_s": 0.5}),  # 160 tokens in 320 s, nearly all of it compiling
        ("train", {"step": 20, "tokens_per_s": 16.0}),  # 10 s
        ("val", {"step": 20, "seconds": 400.0}),
        ("start", {"step": 20}),
        ("train", {"step": 30, "tokens_per_s": 2.0}),
        ("train", {"step": 40, "tokens_per_s": 8.0}),  # 20 s
        ("val", {"step": 40, "seconds": 600.0}),
    ]
    label, (scale,) = known([make_run(lines)], "minutes")
    assert label == "minutes of training"
    assert scale.at([10, 20, 30, 40]) == pytest.approx([10 / 60, 20 / 60, 40 / 60, 60 / 60])
    assert known([make_run(lines)], "tokens")[1][0].at([20]) == pytest.approx([320e-6])


def test_runs_are_only_compared_by_what_all_of_them_know(three):
    new = make_run([START, ("val", {"step": 20, "seconds": 60.0, "trained_seconds": 30.0})])
    old = read_run(three[0])
    assert known([new], "minutes")[0] == "minutes of training"
    label, scales = known([new, old], "minutes")
    assert label == "minutes, validation and compiling included"
    assert [scale.at([20]) for scale in scales] == [[1.0], [2.0]]
    assert axis([old, new], "tokens") is None, "sequences of digits are not counted in this journal"
    assert axis([make_run([START])], "minutes") is None


def test_a_run_that_has_only_begun_takes_no_axis_from_the_others(three):
    begun = Run(Path("begun"), preset("digits"), [{"kind": "start", "step": 0}])
    for runs, views in (([begun, read_run(three[0])], ["steps", "minutes"]), ([begun], [])):
        assert list(charts([*enumerate(group(runs))])) == views


def test_the_page_switches_between_axes_without_a_script(tmp_path):
    folder = write_run(tmp_path / "a", preset("lm-tiny"), None)
    text = read([folder], tmp_path)
    parse(text)
    assert re.findall(r'<label for="view-\d">(\w+)</label>', text) == ["steps", "tokens", "minutes"]
    assert re.findall(r'id="(view-\d)" checked', text) == ["view-0"]
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "a hidden chart's parts are not taken for a visible one's"
    timed = replace(preset("lm-tiny"), train=replace(preset("lm-tiny").train, minutes=2.0))
    text = read([write_run(tmp_path / "b", timed, None)], tmp_path)
    assert re.findall(r'id="(view-\d)" checked', text) == ["view-2"], "equal minutes are seen first"


def test_pictures_stand_alone(three, tmp_path):
    three.append(
        write_run(tmp_path / "other", replace(preset("digits"), optim=replace(preset("digits").optim, lr=1.0)), 0.5)
    )
    written = write_pictures([read_run(run) for run in three], tmp_path / "docs" / "digits")
    kinds = [
        f"digits-{part}{against}.{kind}"
        for against in ("steps", "minutes")
        for part in ("loss-", "")
        for kind in ("svg", "png")
    ]
    assert [path.name for path in written] == kinds
    drawn = (tmp_path / "docs" / "digits-minutes.svg").read_text()
    for words in ("Validation accuracy", "minutes, validation and compiling included", "digits, optim.lr 1.0"):
        assert words in drawn
    assert "var(--" not in drawn
    assert (tmp_path / "docs" / "digits-steps.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.read_bytes() for path in written}
    write_pictures([read_run(run) for run in three], tmp_path / "docs" / "digits")
    assert {path: path.read_bytes() for path in written} == before


def test_pictures_that_cannot_be_made_are_refused(three, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    runs = [read_run(run) for run in three]
    with pytest.raises(ValueError, match=r"cannot write .*file"):
        write_pictures(runs, tmp_path / "file" / "digits")
    monkeypatch.setattr(curves, "available", lambda: False)
    with pytest.raises(ValueError, match=r"chela\[plot\]"):
        write_pictures(runs, tmp_path / "digits")


def test_speed_and_memory_stand_in_the_table(three, tmp_path):
    assert not {"Tokens/s", "Memory"} & set(rows(read(three, tmp_path))[0]), "no journal here knows them"
    with (three[0] / "metrics.jsonl").open() as file:
        first, *others = file.read().splitlines()
    rates = [
        {"kind": "train", "step": step, "loss": 1.0, "tokens_per_s": rate}
        for step, rate in ((1, 9.0), (2, 800.0), (3, 804.0))
    ]
    peaks = [
        {"kind": "val", "step": 3, "accuracy": 0.1, "loss": 2.0, "seconds": 1.0, "peak_gib": peak}
        for peak in (1.0, 2.25)
    ]
    (three[0] / "metrics.jsonl").write_text("\n".join([first, *map(json.dumps, rates + peaks), *others]) + "\n")
    table = rows(read(three, tmp_path))
    speed, memory = table[0].index("Tokens/s"), table[0].index("Memory")
    (line,) = [row for row in table if row[0] == "seed 0"]
    assert (line[speed], line[memory]) == ("800", "2.2 GiB")
    (line,) = [row for row in table if row[0] == "seed 1"]
    assert (line[speed], line[memory]) == ("–", "–")
