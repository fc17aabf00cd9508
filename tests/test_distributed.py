import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from chela.models.files import read_weights
from chela.training import distributed
from chela.training.checkpoint import steps
from test_checkpoint import assert_same_run, curve  # pyrefly: ignore
from training_kit import make_run, run_tiny, start  # pyrefly: ignore

pytestmark = pytest.mark.slow


def launcher() -> tuple[str, ...]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(port),
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, err
    return out, err


KINDS = {
    "classifier": {"dropout": 0.0},
    "causal-lm": {"dropout": 0.0, "kind": "causal-lm", "causal": True},
}


@pytest.fixture
def double():
    """Numbers are float64 where nothing else is said."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_curve_of_one(tmp_path, kind, double):
    settings = {"model": KINDS[kind], "accumulate": 2, "log_every": 1}
    out, _ = finish(start(make_run(tmp_path / "two", **settings), tmp_path, launcher=launcher(), DOUBLE="1"))
    assert out.count("status: done") == 2
    assert out.count("2 processes") == 1, "rank 0 alone speaks"
    run_tiny(make_run(tmp_path / "one", **settings))
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [(entry["kind"], entry["step"]) for entry in one] == [(entry["kind"], entry["step"]) for entry in two]
    # Sums in another order differ by some 1e-15. AdamW divides by the root of the mean square, so it can grow by the
    # ratio of the largest gradient to a small one; 1e-8 would be visible in no float32 run.
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "accuracy", "grad_norm", "count"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-8)
    weights = [read_weights(tmp_path / name / "model.safetensors")[1] for name in ("one", "two")]
    for name, value in weights[0].items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-8)


def test_two_processes_stop_together_and_go_on_bit_equal(tmp_path):
    model = {"norm": "batch", "prenorm": False}  # running statistics too, and their average
    settings = {"model": model, "steps": 150, "save_every": 50, "eval_every": 50, "log_every": 3, "ema_decay": 0.9}
    finish(start(make_run(tmp_path / "whole", **settings), tmp_path, launcher=launcher()))
    run = make_run(tmp_path / "parts", **settings)
    process = start(run, tmp_path, launcher=launcher())
    journal = tmp_path / "parts" / "metrics.jsonl"
    while not journal.exists() or '"train"' not in journal.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGTERM)  # one is told, both stop
    out, _ = finish(process)
    assert out.count("status: stopped") == 2
    stopped = int(steps(tmp_path / "parts" / "checkpoint")[-1].name.removeprefix("step-"))
    assert 0 < stopped < 150
    out, _ = finish(start(run, tmp_path, launcher=launcher()))
    assert f"going on from step {stopped} of 150" in out
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_refusal_reaches_every_process(tmp_path):
    run_tiny(make_run(tmp_path / "run", steps=3))
    process = start(make_run(tmp_path / "run", steps=4), tmp_path, launcher=launcher())
    _, err = finish(process, code=1)  # torchrun's own
    refusals = [line for line in err.splitlines() if line.startswith("refused: ")]
    assert len(refusals) >= 1
    assert all("train.steps was 3, now 4" in line for line in refusals)


def test_a_command_s_refusal_is_said_once(tmp_path):
    words = ("-m", "chela", "train", "digits", "--out", str(tmp_path / "run"), "--model.layers", "1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for steps_, code in ((2, 0), (3, 1)):
        command = [sys.executable, *launcher(), *words, "--train.steps", str(steps_)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
        )
        _, err = finish(process, code)
    refusals = [line for line in err.splitlines() if line.startswith("chela: ")]
    assert len(refusals) == 1
    assert "train.steps was 2, now 3" in refusals[0]


def run_script(path: Path, text: str, code: int = 0) -> list[str]:
    """Lines that two processes of a script print, each written at once."""
    path.write_text(
        f"import os, sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "def say(text): os.write(1, f'{text}\\n'.encode())\n" + text
    )
    process = subprocess.Popen(
        [sys.executable, *launcher(), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return finish(process, code)[0].splitlines()


def test_texts_are_gathered_and_rank_0_goes_first(tmp_path):
    text = """
from chela.training import distributed as d
with d.world("cpu"):
    for text in (["", "über"][d.rank()], ["a" * 300, ""][d.rank()]):
        say(d.gather_texts(text))
    say(d.on_main(lambda: f"from {d.rank()}"))
    try:
        d.main_first(lambda: int("no") if d.is_main() else 1 / 0)
    except ValueError as error:
        say(error)
"""
    expected = [str(["", "über"]), str(["a" * 300, ""]), "from 0", "invalid literal for int() with base 10: 'no'"]
    assert sorted(run_script(tmp_path / "texts.py", text)) == sorted(2 * expected)


def test_one_rank_alone_sees_nan_and_all_name_its_layer(tmp_path):
    text = f"""
import torch
from pathlib import Path
from unittest.mock import patch
from chela.models import build
from chela.training import NonFinite, distributed, train
from training_kit import make_run, make_task, tiny_task  # pyrefly: ignore

def poisoned(config):
    model = build(config)
    bad = lambda module, args, out: out * float("nan") if module.training and distributed.rank() == 1 else None
    model.backbone.blocks[1].feed_forward[0].register_forward_hook(bad)
    return model

with tiny_task(make_task()), patch("chela.training.loop.build", poisoned):
    try:
        train(make_run(Path({str(tmp_path / "run")!r})))
    except NonFinite as error:
        say(error)
"""
    lines = [line for line in run_script(tmp_path / "poison.py", text) if "at step 1" in line]
    assert len(lines) == 2
    assert all("first in the output of backbone.blocks.1.feed_forward.0 " in line for line in lines)


def test_alone_everything_is_local():
    assert (distributed.rank(), distributed.size(), distributed.is_main()) == (0, 1, True)
    values = torch.arange(3.0)
    assert torch.equal(distributed.sum_over_ranks(values.clone()), values)
    assert distributed.gather_texts("x") == ["x"]
    model = torch.nn.Linear(2, 2)
    assert distributed.wrap(model, torch.device("cpu")) is model
    calls = []
    assert distributed.main_first(lambda: calls.append(1) or np.int64(3)) == 3
    assert calls == [1]
