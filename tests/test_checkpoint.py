import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from chela import disk
from chela.config import DataConfig
from chela.data import load_task
from chela.models import build, load_model
from chela.training import checkpoint, journal
from chela.training.checkpoint import State, restore, save_checkpoint, steps, verify
from chela.training.folder import RunFolder
from chela.training.interrupt import Interrupt
from chela.training.optim import make_optimizer
from chela.training.stream import Source
from training_kit import make_run, make_task, run_tiny, start  # pyrefly: ignore


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def curve(folder: Path) -> list[dict]:
    """What a run computed: its journal without starts, ends and clocks."""
    clocks = {"seconds", "trained_seconds", "tokens_per_s", "peak_gib"}
    entries = journal.read(folder / "metrics.jsonl")
    return [
        {key: value for key, value in entry.items() if key not in clocks}
        for entry in entries
        if entry["kind"] in ("train", "val", "test")
    ]


def assert_same_run(one: Path, two: Path) -> None:
    """Weights, averages and curves are bit-equal."""
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    last = steps(one / "checkpoint")[-1].name
    for name in ("model.safetensors", "optimizer.safetensors", "best.safetensors"):
        assert (one / "checkpoint" / last / name).read_bytes() == (two / "checkpoint" / last / name).read_bytes(), name
    assert curve(one) == curve(two)


def stop_after(done: int):
    """Ask the run to stop after so many steps of this start."""
    asked = count()
    return patch.object(Interrupt, "reason", property(lambda self: "test" if next(asked) >= done else ""))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run_tiny(make_run(folder))
    return folder


def test_round_trip_is_bit_equal(tmp_path):
    run = make_run(tmp_path)
    torch.manual_seed(0)
    model = build(run.model)
    optimizer = make_optimizer(model, run.optim)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    state = State(step=7, seconds=1.25, sums=[0.1, 2.0, 1 / 3], targets=5, steps=2)
    save_checkpoint(tmp_path, run, model, optimizer, state, tmp_path / "none")
    read, recorded = verify(tmp_path / "step-00000007")
    assert (read, recorded) == (state, run)

    torch.manual_seed(1)
    other = build(run.model)
    averages = make_optimizer(other, run.optim)
    restore(tmp_path / "step-00000007", other, averages)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == averages.state[b].keys()
        assert all(torch.equal(optimizer.state[a][key], averages.state[b][key]) for key in optimizer.state[a])


@pytest.mark.parametrize("stops", [(1,), (3,), (5, 4), (11,), (2, 2, 2, 2)])
def test_a_stopped_run_ends_bit_equal(tmp_path, undisturbed, stops):
    run, step = make_run(tmp_path), 0
    for done in stops:
        with stop_after(done):
            result, printed = run_tiny(run)
        step += done
        assert (result.status, result.step, result.test) == ("stopped", step, None)
        assert f"at step {step} of 12; the same command goes on" in printed
    result, printed = run_tiny(run)
    assert f"going on from step {step} of 12" in printed
    assert result.status == "done"
    assert_same_run(tmp_path, undisturbed)


def test_batch_norm_goes_on_bit_equal(tmp_path):
    model = {"norm": "batch", "branch_norm": True, "tap_dropout": 0.2, "token_dropout": 0.2, "prenorm": False}
    run_tiny(make_run(tmp_path / "a", model=model))
    with stop_after(5):
        run_tiny(make_run(tmp_path / "b", model=model))
    run_tiny(make_run(tmp_path / "b", model=model))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_batches_of_like_lengths_go_on_bit_equal(tmp_path):
    settings = {"batch_size": 8, "bucket_batches": 3, "pad_multiple": 8, "steps": 10, "save_every": 4}
    model = {"vocab": 16, "classes": 10, "kernel_length": 40, "norm": "batch"}
    run = make_run(tmp_path / "whole", model=model, **settings)
    task = load_task(DataConfig(task="listops", root=tmp_path, examples=100, min_length=8, max_length=40))
    lengths = {Source(task, run).share(step).parts[0].inputs.shape[1] for step in range(3)}
    assert len(lengths) > 1, "take other lengths: a pool must hold batches of several"
    run_tiny(run, task)
    pieces = replace(run, out=tmp_path / "pieces")
    stops = 0
    while run_tiny(replace(pieces, train=replace(pieces.train, time_limit="0.001s")), task)[0].status == "stopped":
        stops += 1
    assert stops == 9
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


class Crash(BaseException):
    """The power goes."""


class PowerCut:
    """Ends a run before its n-th change of anything below a folder; later ones are free again."""

    CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "open")

    def __init__(self) -> None:
        self.left, self.folder = -1, ""
        sys.addaudithook(self.hook)  # cannot be taken back, only left idle

    def hook(self, event: str, args: tuple) -> None:
        if self.left < 0 or event not in self.CHANGES or not str(args[0]).startswith(self.folder):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        self.left -= 1
        if self.left < 0:
            raise Crash


@pytest.fixture(scope="module")
def power() -> PowerCut:
    return PowerCut()


@pytest.mark.slow
def test_a_crash_before_any_change_on_disk_costs_nothing_but_time(tmp_path, power):
    settings = {"steps": 4, "save_every": 1, "eval_every": 2, "log_every": 1, "keep": 1}
    reference = tmp_path / "reference"
    run_tiny(make_run(reference, model={"layers": 1}, **settings))
    crashes = 0
    for number in count():
        folder = tmp_path / f"crash{number}"
        run = make_run(folder, model={"layers": 1}, **settings)
        power.folder, power.left = str(folder), number
        try:
            run_tiny(run)
            power.left = -1
            break
        except Crash:
            crashes += 1
        run_tiny(run)
        assert_same_run(folder, reference)
        assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["step-00000004"]
    assert crashes > 30, "a run changes the disk often; the hook must have seen it"


@pytest.mark.slow
def test_kill_9_twice_ends_bit_equal(tmp_path):
    settings = {"steps": 200, "save_every": 20, "eval_every": 50, "log_every": 7}
    run_tiny(make_run(tmp_path / "a", **settings))
    run = make_run(tmp_path / "b", **settings)
    seen = 0
    for _ in range(2):
        process = start(run, tmp_path / "settings")
        until = time.monotonic() + 100
        while not (saved := steps(tmp_path / "b" / "checkpoint")) or saved[-1].name == seen:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        process.communicate()
        seen = steps(tmp_path / "b" / "checkpoint")[-1].name
    process = start(run, tmp_path / "settings")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "going on from step" in out
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_with_0(tmp_path, number):
    run = make_run(tmp_path / "run", steps=100_000, save_every=100_000, eval_every=100_000, log_every=5)
    process = start(run, tmp_path)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or '"train"' not in (
        (tmp_path / "run" / "metrics.jsonl").read_text()
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.endswith("status: stopped\n")
    assert f"stopped ({number.name})" in out
    end = journal.read(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (end["kind"], end["status"]) == ("end", "stopped")
    assert end["seconds"] > 0
    assert steps(tmp_path / "run" / "checkpoint")[-1].name == f"step-{end['step']:08d}"


def test_signal_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run_tiny(make_run(tmp_path, steps=1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_while_the_model_is_made_saves_after_one_step(tmp_path, undisturbed, monkeypatch):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return make_optimizer(*args)

    with monkeypatch.context() as patched:
        patched.setattr("chela.training.loop.make_optimizer", interrupted)
        result = run_tiny(make_run(tmp_path))[0]
    assert (result.status, result.step) == ("stopped", 1)
    run_tiny(make_run(tmp_path))
    assert_same_run(tmp_path, undisturbed)


def test_a_second_ctrl_c_stops_at_once():
    with Interrupt(None) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_time_limit_stops_after_at_least_one_step(tmp_path, undisturbed):
    run = make_run(tmp_path, time_limit="0.001s")
    done = []
    while (result := run_tiny(run)[0]).status == "stopped":
        done.append(result.step)
    assert done == list(range(1, 12))
    assert_same_run(tmp_path, undisturbed)


def test_the_last_checkpoints_are_kept(tmp_path):
    run_tiny(make_run(tmp_path, save_every=2, keep=3))
    assert [p.name for p in steps(tmp_path / "checkpoint")] == ["step-00000008", "step-00000010", "step-00000012"]


def test_a_finished_run_is_not_run_again(tmp_path):
    first, _ = run_tiny(make_run(tmp_path))
    before = tree(tmp_path)
    with patch("chela.training.loop.build", side_effect=AssertionError("nothing is to be computed")):
        again, printed = run_tiny(make_run(tmp_path))
    assert again == replace(first, status="already done")
    assert "already done" in printed
    assert tree(tmp_path) == before


def test_other_settings_are_refused_and_nothing_changes(tmp_path):
    with stop_after(4):
        run_tiny(make_run(tmp_path))
    before = tree(tmp_path)
    other = make_run(tmp_path, optim={"lr": 5e-3}, batch_size=4)
    with pytest.raises(ValueError, match=r"optim\.lr was 0\.003, now 0\.005; train\.batch_size was 8, now 4") as caught:
        run_tiny(other)
    assert "--out" in str(caught.value)
    assert "delete" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before
    (tmp_path / "config.toml").unlink()
    with pytest.raises(ValueError, match=r"config\.toml does not"):
        run_tiny(other)


def test_harmless_settings_may_change(tmp_path, undisturbed):
    with stop_after(4):
        run_tiny(make_run(tmp_path / "before"))
    (tmp_path / "before").rename(tmp_path / "after")
    run_tiny(make_run(tmp_path / "after", save_every=5, keep=1, time_limit="1h", chance_after=7))
    assert (tmp_path / "after" / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_harmless_keys_exist(tmp_path):
    other = make_run(tmp_path / "x", steps=13)
    lines = checkpoint.conflicts(make_run(tmp_path), other)
    assert lines == ["train.steps was 12, now 13"]
    for key in checkpoint.HARMLESS:
        owner = other
        for part in key.split("."):
            owner = getattr(owner, part)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "edited": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"x" + path.read_bytes()[-8:]),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "best.safetensors", "state.json", "SHA256SUMS"]
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage, name):
    with stop_after(7):
        run_tiny(make_run(tmp_path, model={"layers": 1}))
    newest = tmp_path / "checkpoint" / "step-00000007"
    path = newest / name
    copy = path.read_bytes()
    path.unlink()  # best.safetensors is one file with model.safetensors
    path.write_bytes(copy)
    DAMAGE[damage](path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=rf"delete the folder {newest} to go on from step-00000006") as caught:
        run_tiny(make_run(tmp_path, model={"layers": 1}))
    assert "\n" not in str(caught.value)
    if name != "SHA256SUMS" or damage in ("empty", "gone"):
        assert str(path) in str(caught.value)
    assert tree(tmp_path) == before


def test_after_deleting_a_damaged_checkpoint_the_older_one_serves(tmp_path, undisturbed):
    with stop_after(7):
        run_tiny(make_run(tmp_path))
    newest = tmp_path / "checkpoint" / "step-00000007"
    DAMAGE["truncated"](newest / "model.safetensors")
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    _, printed = run_tiny(make_run(tmp_path))
    assert "going on from step 6" in printed
    assert_same_run(tmp_path, undisturbed)


def test_weights_in_a_checkpoint_that_do_not_fit_the_code_are_refused(tmp_path):
    run = make_run(tmp_path)
    model = build(run.model)
    save_checkpoint(tmp_path, run, model, make_optimizer(model, run.optim), State(step=1), tmp_path / "none")
    other = build(replace(run.model, d_model=16))
    with pytest.raises(ValueError, match="another version of chela"):
        restore(tmp_path / "step-00000001", other, make_optimizer(other, run.optim))


def test_a_folder_in_use_is_refused(tmp_path):
    with stop_after(4):
        run_tiny(make_run(tmp_path))
    before = tree(tmp_path)
    with RunFolder(tmp_path) as holder:
        holder.inspect(make_run(tmp_path))
        with pytest.raises(ValueError, match="in use by another process"):
            run_tiny(make_run(tmp_path))
    assert tree(tmp_path) == before
    assert run_tiny(make_run(tmp_path))[0].status == "done"


def test_two_first_starts_at_once_cannot_share_a_folder(tmp_path):
    run = make_run(tmp_path / "run")
    with RunFolder(run.folder) as one, RunFolder(run.folder) as two:
        found = one.inspect(run), two.inspect(run)
        one.claim(run, found[0])
        with pytest.raises(ValueError, match="in use"):
            two.claim(run, found[1])
    with RunFolder(run.folder) as late, pytest.raises(ValueError, match="has just begun"):
        late.claim(run, found[1])


@pytest.mark.parametrize("name", ["metrics.jsonl", "model.safetensors", "checkpoint"])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"{name} exists, but .*config\.toml does not.*--out"):
        run_tiny(make_run(tmp_path))
    assert (tmp_path / name).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_other_files_in_the_folder_do_not_matter(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert run_tiny(make_run(tmp_path, steps=2))[0].status == "done"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        run_tiny(make_run(tmp_path / "run"))


def test_a_torn_last_line_and_lines_beyond_the_checkpoint_are_cut(tmp_path, undisturbed):
    with stop_after(5):
        run_tiny(make_run(tmp_path))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": 6, "loss": 9.0}) + "\n" + '{"kind": "tr')
    run_tiny(make_run(tmp_path))
    assert_same_run(tmp_path, undisturbed)


def test_a_journal_that_was_edited_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "start"}\nhello\n{"kind": "end"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        journal.read(tmp_path / "metrics.jsonl")


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, undisturbed):
    write, written = checkpoint.write_synced, []

    def full(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) == 6:  # the second checkpoint's second file
            path.write_bytes(content[:100])
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    with patch.object(checkpoint, "write_synced", full), pytest.raises(ValueError, match="No space left on device"):
        run_tiny(make_run(tmp_path))
    assert [path.name for path in steps(tmp_path / "checkpoint")] == ["step-00000003"]
    run_tiny(make_run(tmp_path))
    assert_same_run(tmp_path, undisturbed)


def test_a_full_disk_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"old")

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:1])
        raise OSError(28, "No space left on device", str(path))

    with patch.object(disk, "write_synced", full), pytest.raises(OSError, match="No space left"):
        disk.write_whole(path, b"new")
    assert tree(tmp_path).keys() == {"weights"}
    assert path.read_bytes() == b"old"


def test_the_best_weights_are_in_the_folder_from_the_first_checkpoint_on(tmp_path):
    with stop_after(4):
        result, _ = run_tiny(make_run(tmp_path, eval_every=2))
    assert result.validation is not None
    load_model(tmp_path / "model.safetensors", make_run(tmp_path).model)


def test_the_task_is_the_same_in_every_start():
    task = make_task()
    assert torch.equal(task.train.batch([1, 2]).inputs, make_task().train.batch([1, 2]).inputs)
