"""Training for minutes instead of steps: the schedule ends when the time does, whatever a step takes."""

import hashlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chela.config import OptimConfig, TrainConfig
from chela.training import journal
from chela.training.checkpoint import SUMS, steps
from chela.training.optim import schedule
from chela.training.pace import steps_in_all
from test_checkpoint import stop_after  # pyrefly: ignore
from test_distributed import finish, launcher  # pyrefly: ignore
from training_kit import make_run, run_tiny, start  # pyrefly: ignore

MINUTES = 0.02  # 1.2 s


def trained(folder: Path) -> float:
    """Seconds that the newest checkpoint says were spent on updates."""
    return json.loads((steps(folder / "checkpoint")[-1] / "state.json").read_text())["trained"]


def ends_in_time(folder: Path, step: int) -> bool:
    """Not before the step within which the time ran out; how long that one took is the machine's affair."""
    return trained(folder) >= 60 * MINUTES * (step - 1) / (step + 0.5)


def test_without_minutes_the_steps_are_those_asked_for():
    assert [steps_in_all(TrainConfig(steps=7), step, 100.0) for step in (0, 6)] == [7, 7]


@pytest.mark.parametrize("pace", ["even", "uneven", "slower and slower", "in leaps"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_rate_falls_to_its_end_as_the_time_does(pace, kind):
    """In leaps: as a GPU is waited for now and then, the clock stands still in between."""
    train, optim = TrainConfig(minutes=2), OptimConfig(warmup=20, schedule=kind)
    random, clock, shown, step, shares = np.random.default_rng(0), 0.0, 0.0, 0, []
    while True:
        in_all = steps_in_all(train, step, shown)
        shares.append(schedule(optim, step, in_all))
        step += 1
        clock += {"uneven": random.uniform(0.01, 1), "slower and slower": 0.01 * step}.get(pace, 0.25)
        shown = clock if pace != "in leaps" or step % 10 == 0 else shown
        if step == in_all:
            break
        assert step < 10_000
    longest = 2.5 if pace == "in leaps" else 1.2
    assert abs(clock - 120) <= longest, "two minutes, to a step (or a leap)"
    assert shares[19] == 1
    assert shares[-1] < 0.03
    rounding = 1 / (step - 20)
    if pace != "in leaps":
        assert all(later <= earlier + rounding for earlier, later in itertools.pairwise(shares[19:]))
    if pace == "even":
        assert shares == pytest.approx([schedule(optim, n, step) for n in range(step)], abs=2 * rounding)


def test_a_run_of_minutes_ends_with_its_schedule_and_is_tested(tmp_path):
    run = make_run(tmp_path, minutes=MINUTES, steps=1, optim={"schedule": "cosine"})
    result, _ = run_tiny(run)
    lines = journal.read(tmp_path / "metrics.jsonl")
    assert result.status == "done"
    assert result.step > 3, "steps are not counted"
    assert ends_in_time(tmp_path, result.step)
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert rates[-1] < 0.1 * max(rates) <= 0.1 * run.optim.lr
    last = [line for line in lines if line["kind"] == "val"][-1]
    assert last["step"] == result.step
    assert last["trained_seconds"] == pytest.approx(trained(tmp_path), abs=1e-3)
    assert last["trained_seconds"] < last["seconds"], "validation and the first step are left out"
    assert "already done" in run_tiny(run)[1]


def test_a_stopped_run_of_minutes_goes_on_with_the_time_it_had(tmp_path):
    run = make_run(tmp_path, minutes=MINUTES, save_every=1000)
    with stop_after(9):
        result, printed = run_tiny(run)
    assert (result.status, result.step) == ("stopped", 9)
    assert "stopped (test) at step 9 of about " in printed
    before = trained(tmp_path)
    assert 0 < before < 60 * MINUTES
    with pytest.raises(ValueError, match=r"train\.minutes was 0\.02, now 0\.03"):
        run_tiny(replace(run, train=replace(run.train, minutes=0.03)))
    result, printed = run_tiny(run)
    assert "going on from step 9 of about " in printed
    assert result.status == "done"
    assert before < trained(tmp_path)
    assert ends_in_time(tmp_path, result.step)


def test_an_older_checkpoint_goes_on_without_a_clock(tmp_path):
    run = make_run(tmp_path)
    with stop_after(5):
        run_tiny(run)
    checkpoint = steps(tmp_path / "checkpoint")[-1]
    record = json.loads((checkpoint / "state.json").read_text())
    del record["trained"]
    (checkpoint / "state.json").write_text(json.dumps(record))
    sums = [line.split("  ")[1] for line in (checkpoint / SUMS).read_text().splitlines()]
    digests = [hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in sums]
    table = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, sums, strict=True))
    (checkpoint / SUMS).write_text(table)
    assert run_tiny(run)[0].status == "done"


@pytest.mark.slow
def test_processes_end_at_the_same_step(tmp_path):
    run = make_run(tmp_path / "run", minutes=MINUTES)
    out, _ = finish(start(run, tmp_path, launcher=launcher()))
    assert out.count("status: done") == 2
    assert journal.read(tmp_path / "run" / "metrics.jsonl")[-1]["status"] == "done"


@pytest.mark.parametrize("minutes", [-1, math.inf, math.nan])
def test_minutes_out_of_range_are_refused(minutes):
    with pytest.raises(ValueError, match=r"train\.minutes must be finite and not negative"):
        TrainConfig(minutes=minutes)
