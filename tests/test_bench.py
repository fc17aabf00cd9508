import csv
import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from chela.evaluation import bench, bench_cases
from chela.evaluation.bench import COLUMNS, run_bench
from chela.evaluation.bench_cases import SUITES
from chela.evaluation.timing import measure

CPU = torch.device("cpu")
SMALL = {"B": 1, "T": 9, "H": 2, "K": 4, "V": 4, "D": 4, "W": 3, "L": 9}
SHAPES: dict[str, tuple[dict[str, int], ...]] = {
    suite.op: ({axis: SMALL[axis] for axis in suite.check},) for suites in SUITES.values() for suite in suites
}  # every suite's axes, few of each


def table(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


def test_every_suite_is_checked_timed_and_recorded(tmp_path, console):
    out = tmp_path / "bench.csv"
    rows = run_bench([], out=out, device="cpu", seconds=0, shapes=SHAPES, console=console)
    with out.open(encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [row["op"] for row in written] == [row["op"] for row in rows]
    assert tuple(written[0]) == COLUMNS
    assert {row["op"] for row in written} == {suite.op for suites in SUITES.values() for suite in suites}
    for row in written:
        assert 0 < float(row["low_ms"]) <= float(row["median_ms"]) <= float(row["high_ms"])
        assert int(row["repeats"]) >= 3
        assert float(row["tokens_per_s"]) == pytest.approx(
            {"decode": 1}.get(row["op"].split(",")[0], 9) * 1000 / float(row["median_ms"]), rel=1e-3
        )
        assert row["torch"] == torch.__version__
        assert all(row[fact] for fact in ("device", "dtype", "chela", "python", "date", "threads", "shape"))
        ours = row["implementation"].startswith("chela")
        assert bool(row["worst_relative_error"]) == ours, (
            "ours were checked in the same run, peers are not ours to check"
        )
        if ours:
            assert float(row["worst_relative_error"]) < 1e-4
    passes = {(row["op"], row["pass"]) for row in written}
    assert ("linear-attention", "forward+backward") in passes
    assert ("decode, linear attention", "forward+backward") not in passes
    text = table(console)
    assert all(row["implementation"] in text for row in written)
    assert f"{len(rows)} measurements" in text.replace("\n", " ")


def test_nothing_is_timed_that_fails_its_check(tmp_path, console, monkeypatch):
    (short,) = SUITES["short-conv"]
    timed = []
    ours = [c for c in short.contenders if c.impl == "reference"]
    wrong = replace(ours[0], run=lambda **inputs: ours[0].run(**inputs) * 1.001)
    monkeypatch.setitem(bench_cases.SUITES, "short-conv", (replace(short, contenders=(wrong,)),))
    monkeypatch.setattr(bench, "measure", lambda *words: timed.append(words))
    with pytest.raises(AssertionError, match=r"short-conv, chela reference, torch\.float32 on cpu"):
        run_bench(["short-conv"], out=tmp_path / "b.csv", device="cpu", shapes=SHAPES, console=console)
    assert not timed


@pytest.mark.parametrize("op", ["linear-attention", "short-conv", "long-conv"])
def test_peers_do_the_same_job_where_they_can(op):
    """Softmax attention is another function; the others must give our numbers in the layout they like."""
    suite = SUITES[op][0]
    inputs = suite.make(suite.check, torch.float64, CPU)
    expected = suite.plain(**inputs)
    for contender in suite.contenders:
        if contender.impl == "triton" or "softmax" in contender.name:
            continue
        found = contender.run(**contender.prepare(inputs, suite.check))
        if not contender.impl:
            found = found.transpose(1, 2)  # peers of the convolutions like [B, D, T]
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10, msg=contender.name)


def test_a_measurement_repeats_until_its_time_is_spent():
    calls = []
    found = measure(lambda: calls.append(1), CPU, seconds=0.0)
    assert found.repeats >= 3
    assert len(calls) >= found.repeats
    assert 0 <= found.low <= found.median <= found.high
    assert measure(lambda: None, CPU, seconds=9e9).repeats <= 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"ops": ["long-con"]}, r"unknown op 'long-con' \(did you mean 'long-conv'\?\); ops: linear-attention, "),
        ({"seconds": -0.1}, "seconds must not be negative"),
        ({"out": "no/folder/bench.csv"}, r"cannot write .*: No such file or directory"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(words, message, tmp_path, console):
    given = {"ops": ["short-conv"], "out": "bench.csv", "device": "cpu", "shapes": SHAPES, "console": console} | words
    given["out"] = tmp_path / given["out"]
    with pytest.raises(ValueError, match=message):
        run_bench(given.pop("ops"), **given)
    assert not list(tmp_path.rglob("*.csv"))
    assert not table(console)
