"""The commands: arguments and their help, no logic of their own. Whatever is heavy is imported inside them."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from chela.config import DataConfig, Encoding, ModelConfig, OptimConfig, RunConfig, TrainConfig
from chela.presets import PRESETS, preset
from chela.record import nearest

Device = Literal["auto", "cpu", "cuda"]
ROOT = DataConfig().root
RunPath = Positional[Annotated[Path, arg(metavar="RUN")]]
RunPaths = Positional[Annotated[tuple[Path, ...], arg(metavar="RUN ...")]]
OpNames = Positional[Annotated[tuple[str, ...], arg(metavar="[OP ...]")]]
TaskName = Positional[Annotated[str, arg(metavar="[TASK]")]]


@dataclass(frozen=True, kw_only=True)
class DataPlace:
    """Where the data lie, if they have moved since training."""

    root: Path | None = None
    """Folder of downloaded and generated data; the run's own when left out."""


def training(start: RunConfig) -> Callable[..., None]:
    """Make the train command whose defaults are a preset's settings."""

    def train(
        seed: int = start.seed,
        out: Path | None = None,
        model: ModelConfig = start.model,
        data: DataConfig = start.data,
        optim: OptimConfig = start.optim,
        train: TrainConfig = start.train,
    ) -> None:
        """Train a preset and write its run: settings, journal, weights, report.

        Ctrl-C or --train.time-limit save and stop; the same command goes on from there.

        Args:
            seed: Seed of initial weights, of the order of examples and of dropout.
            out: Folder of the run; runs/PRESET-seedN when left out.
            model: The model.
            data: The data.
            optim: The optimiser.
            train: The training loop.
        """
        from chela.evaluation.report import write_report
        from chela.evaluation.results import show
        from chela.evaluation.runs import read_run
        from chela.training import train as run_training
        from chela.training.distributed import is_main

        folder = Path("") if out is None else Path.cwd() if out == Path("") else out
        run = replace(start, seed=seed, out=folder, model=model, data=data, optim=optim, train=train)
        run_training(run)
        if is_main():
            show([read_run(run.folder)])
            print(f"report: {write_report([run.folder], run.folder / 'report.html')}")

    return train


def evaluate(
    run: RunPath,
    split: Literal["test", "val", "train"] = "test",
    data: DataPlace = DataPlace(),
    batch_size: int = 0,
    device: Device = "auto",
) -> None:
    """Evaluate the weights of a run on a split of its task.

    Args:
        run: Folder of the run.
        split: Which part of the data.
        data: The data.
        batch_size: Examples a batch; 0 takes the run's own.
        device: Where to compute; auto takes the GPU when there is one.
    """
    from chela.evaluation.evaluate import evaluate_run

    print(evaluate_run(run, split, root=data.root, batch_size=batch_size, device=device).describe())


def generate(
    run: RunPath,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop: tuple[str, ...] = (),
    seed: int = 0,
    device: Device = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> None:
    """Continue a prompt with the language model of a run.

    Args:
        run: Folder of the run.
        prompt: Text to continue.
        max_new_tokens: Tokens to write.
        temperature: Divides the logits; 0 takes the likeliest token each time.
        top_k: Draw among the k likeliest tokens; 0 draws among all.
        top_p: Draw among the fewest likeliest tokens that hold this share of the probability.
        repetition_penalty: Above 1, tokens that came before get less likely; 1 leaves them alone.
        stop: End before the first of these strings.
        seed: The same seed gives the same text.
        device: Where to compute; auto takes the GPU when there is one.
        dtype: Type of the matrix products; auto is the run's own (train.dtype), which when auto too is bfloat16 on a
            GPU, float32 on a CPU.
    """
    from chela.evaluation.generate import generate_run

    written = generate_run(
        run,
        prompt,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
        device=device,
        dtype=dtype,
        write=lambda text: print(text, end="", flush=True),
    )
    print(f"\n{written.tokens} tokens, {written.tokens_per_second:,.0f} a second", file=sys.stderr)


def data(
    task: TaskName = "",
    root: Path = ROOT,
    encoding: Encoding = "",
    vocab: int = 0,
    packed: bool = False,
    rate: int = 0,
    max_length: int = 0,
    min_length: int = 0,
    examples: int = 0,
    distractors: int = 0,
    seed: int = 0,
    show: bool = False,
) -> None:
    """Prepare the data of a task and say what is there; without a task, list the tasks.

    The options are those of `chela train PRESET --data.NAME`.

    Args:
        task: Name of the task.
        root: Folder of downloaded and generated data.
        encoding: What a step is: byte or character of a text or a token of a BPE trained on it, pixel as real value
            or as token.
        vocab: Symbols of the tokenizer (encoding bpe).
        packed: Rows hold whole documents (language models).
        rate: Samples a second of recordings.
        max_length: Cut sequences to this many tokens.
        min_length: Shortest tree (ListOps).
        examples: Examples to generate, where the task is generated.
        distractors: Short paths that distract in a generated image (Pathfinder, Path-X).
        seed: Seed of generated data and of splits that are not published.
        show: Draw the first training images with their labels into TASK.png instead (Pathfinder, Path-X).
    """
    from chela.data import TASKS
    from chela.evaluation.contact_sheet import contact_sheet
    from chela.evaluation.datasets import describe_task

    if not task:
        print("\n".join(f"{name:<{max(map(len, TASKS))}}  {line}" for name, line in TASKS.items()))
        return
    try:
        asked = DataConfig(
            task=task,
            root=root,
            encoding=encoding,
            vocab=vocab,
            packed=packed,
            rate=rate,
            max_length=max_length,
            min_length=min_length,
            examples=examples,
            distractors=distractors,
            seed=seed,
        )
        print(contact_sheet(asked, progress=print) if show else describe_task(asked, progress=print))
    except ValueError as error:  # data know their settings by the names that `train` has for them
        raise ValueError(_without_part(str(error))) from None


def bench(
    ops: OpNames = (),
    device: Device = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    seconds: float = 0.3,
    peers: bool = True,
    out: Path = Path("bench.csv"),
) -> None:
    """Check, then time the ops over a range of lengths, beside others and beside the speed of a plain copy.

    Args:
        ops: Any of linear-attention, short-conv, long-conv, decode; all of these when left out. And training: whole
            updates of a model beside a Transformer's; and generation: prompts read and tokens written by both.
        device: Where to compute; auto takes the GPU when there is one.
        dtype: Type of the inputs; auto is bfloat16 on a GPU, float32 on a CPU.
        seconds: Time spent on each measurement.
        peers: Also time torch's own ops and, where installed, flash-linear-attention, which takes minutes to tune
            itself, and lightning attention.
        out: Table of all measurements, with versions and device in every row; plots are written beside it.
    """
    from chela.evaluation.bench import run_bench

    run_bench(ops, device=device, dtype=dtype, seconds=seconds, peers=peers, out=out)


def report(runs: RunPaths, out: Path | None = None, pictures: Path | None = None) -> None:
    """Write one page on several runs: curves, results by configuration over seeds, environment, commands.

    Args:
        runs: Folders of runs, finished or not.
        out: The page to write; report.html when left out, for a single run in its folder.
        pictures: Also write each chart as a file, SVG and PNG, with names that begin so: pictures/lm gives
            pictures/lm-minutes.svg (validation), pictures/lm-loss-minutes.svg, the same against tokens and steps.
    """
    from chela.evaluation.charts import write_pictures
    from chela.evaluation.report import write_report
    from chela.evaluation.results import show
    from chela.evaluation.runs import read_run

    page = write_report(runs, out or (runs[0] if len(runs) == 1 else Path()) / "report.html")
    found = [read_run(run) for run in runs]
    show(found)
    if pictures:
        print(f"pictures: {', '.join(path.name for path in write_pictures(found, pictures))}, in {pictures.parent}")
    print(f"report: {page}")


def doctor(root: Path = ROOT, selftest: bool = False) -> None:
    """Show versions, devices, the implementation each op takes here, optional packages and data.

    Args:
        root: Folder of downloaded and generated data.
        selftest: Also hold every op with kernels to float64 on this machine's GPU (without one: the reference on the
            CPU); exit code 1 when one fails.
    """
    from chela.evaluation.doctor import examine, show

    show(root)
    if selftest and examine():
        raise SystemExit(1)


COMMANDS: dict[str, Callable[..., None]] = {
    "train": training(RunConfig()),
    "eval": evaluate,
    "generate": generate,
    "data": data,
    "bench": bench,
    "report": report,
    "doctor": doctor,
}


def _without_part(message: str) -> str:
    """A message on settings of the data, `--data.max-length` or `data.max_length`, with the names `chela data` has."""
    names = "|".join(re.escape(spelt) for f in fields(DataConfig) for spelt in {f.name, f.name.replace("_", "-")})
    return re.sub(rf"(?:--)?\bdata\.({names})\b", lambda found: f"--{found[1].replace('_', '-')}", message)


def resolve(words: list[str]) -> tuple[Callable[..., None], list[str], str]:
    """The command that a command line names, the words left for it, and its name in messages.

    Raises:
        ValueError: an unknown command or preset (names the nearest), or a training without a preset.
    """
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}{nearest(name, COMMANDS)}; commands: {', '.join(COMMANDS)}")
    if name != "train":
        return COMMANDS[name], rest, f"chela {name}"
    if not rest or rest[0].startswith("-"):
        raise ValueError(f"the preset comes first: chela train PRESET [options]; presets: {', '.join(PRESETS)}")
    return training(preset(rest[0])), rest[1:], f"chela train {rest[0]}"


def presets_help() -> str:
    """What `chela train --help` prints: a line for each preset, from its docstring."""
    width = max(map(len, PRESETS))
    lines = [f"  {name:<{width}}  {(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items()]
    return "\n".join(
        [
            "usage: chela train PRESET [--seed N] [--out DIR] [--model.NAME VALUE] [--data.NAME VALUE] ...",
            "",
            "Train a preset and write its run to runs/PRESET-seedN: settings, journal, weights, report.",
            "Ctrl-C or --train.time-limit save and stop; the same command goes on from there.",
            "",
            "presets:",
            *lines,
            "",
            "`chela train PRESET --help` lists every setting with the preset's value.",
        ]
    )
