import csv
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from chela.evaluation import bench, bench_cases, bench_generation, bench_plot, bench_training, curves
from chela.evaluation.bench import COLUMNS, run_bench
from chela.evaluation.bench_cases import SUITES
from chela.evaluation.bench_peers import FEW
from chela.evaluation.bench_suite import Contender
from chela.evaluation.timing import Time, copy_speed, measure

CPU = torch.device("cpu")
SMALL = {"B": 1, "T": 9, "H": 2, "K": 4, "V": 4, "D": 4, "W": 3, "L": 9, "N": 6}
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
        assert float(row["copy_gb_per_s"]) > 0.1
        assert bool(row["floor_ms"]) == ("decode" not in row["op"])
        if row["floor_ms"]:
            ratio = float(row["median_ms"]) / float(row["floor_ms"])
            assert float(row["ratio_to_floor"]) == pytest.approx(ratio, rel=1e-3)
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


def test_a_narrow_terminal_is_shown_every_column(tmp_path):
    narrow = Console(file=io.StringIO(), width=30, force_terminal=True, color_system=None)
    run_bench(["short-conv"], out=tmp_path / "b.csv", device="cpu", seconds=0, shapes=SHAPES, console=narrow)
    assert "tokens/s" in table(narrow)


def test_nothing_is_timed_that_fails_its_check(tmp_path, console, monkeypatch):
    (short,) = SUITES["short-conv"]
    timed = []
    ours = [c for c in short.contenders if c.impl == "reference"]
    wrong = replace(ours[0], run=lambda **inputs: ours[0].run(**inputs) * 1.001)
    monkeypatch.setitem(bench_cases.SUITES, "short-conv", (replace(short, contenders=(wrong,)),))
    monkeypatch.setattr(bench, "measure", lambda *words: timed.append(words))
    (tmp_path / "b.csv").write_text("an earlier table", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"short-conv, chela reference, torch\.float32 on cpu"):
        run_bench(["short-conv"], out=tmp_path / "b.csv", device="cpu", shapes=SHAPES, console=console)
    assert not timed
    assert (tmp_path / "b.csv").read_text(encoding="utf-8") == "an earlier table"


def test_the_time_of_a_run_of_many_tokens_is_given_for_one(tmp_path, console, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *words: Time(12.0, 6.0, 18.0, 3))
    rows = run_bench(["decode"], out=tmp_path / "b.csv", device="cpu", shapes=SHAPES, console=console)
    found = {row["implementation"]: row for row in rows if row["op"] == "decode, long convolution"}
    assert found["chela reference, online"]["median_ms"] == "2"  # of 6 tokens
    assert found["chela, dot product"]["median_ms"] == "3"  # of 4
    assert found["chela, dot product"]["low_ms"] == "1.5"
    assert found["chela reference, online"]["tokens_per_s"] == "500"


@pytest.mark.parametrize("op", ["linear-attention", "short-conv", "long-conv"])
def test_peers_do_the_same_job_where_they_can(op):
    """Softmax attention is another function; the others must give our numbers in the layout they like."""
    suite = SUITES[op][0]
    inputs = suite.make(suite.check, dtype=torch.float64, device=CPU)
    expected = suite.plain(**inputs)
    for contender in suite.contenders:
        if contender.impl == "triton" or "softmax" in contender.name or contender.package != "torch":
            continue
        found = contender.run(**contender.prepare(inputs, suite.check))
        if not contender.impl:
            found = found.transpose(1, 2)  # peers of the convolutions like [B, D, T]
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10, msg=contender.name)


def test_the_floor_is_the_time_of_a_copy_of_all_that_is_read_and_written(tmp_path, console, monkeypatch):
    monkeypatch.setattr(bench, "copy_speed", lambda *words: 1e6)  # bytes a second
    shape = {"B": 2, "T": 9, "H": 3, "K": 4, "V": 5}
    forward, both, *_ = run_bench(
        ["linear-attention"], out=tmp_path / "b.csv", device="cpu", seconds=0, console=console,
        shapes=SHAPES | {"linear-attention": (shape,)},
    )  # fmt: skip
    q, v = 4 * 2 * 9 * 3 * 4, 4 * 2 * 9 * 3 * 5  # bytes
    assert (forward["pass"], both["pass"]) == ("forward", "forward+backward")
    assert float(str(forward["floor_ms"])) == pytest.approx(1e-3 * (q + q + v + v), rel=1e-4)
    assert float(str(both["floor_ms"])) == pytest.approx(1e-3 * (6 * q + 5 * v), rel=1e-4)


def test_peers_that_are_not_there_or_fail_are_named_and_left_out(tmp_path, console, monkeypatch):
    (short,) = SUITES["short-conv"]

    def broken(**inputs):
        raise RuntimeError("no such\nkernel")

    others = (Contender("gone", broken, package="no_such_package"), Contender("broken", broken))
    contenders = (*short.contenders, *others, Contender("elsewhere", broken, only=({"T": 1},)))
    monkeypatch.setitem(bench_cases.SUITES, "short-conv", (replace(short, contenders=contenders),))
    words: Any = {"out": tmp_path / "b.csv", "device": "cpu", "seconds": 0, "shapes": SHAPES, "console": console}
    rows = run_bench(["short-conv"], **words)
    assert {row["implementation"] for row in rows} == {"chela reference", "torch conv1d, silu"}
    text = table(console)
    assert "gone: skipped, no_such_package is not installed" in text
    assert "broken at B1 T9 D4 W3: RuntimeError: no such kernel" in text
    assert "elsewhere" not in text
    assert text.count("/ours") == 2, "a ratio for each pass"
    rows = run_bench(["short-conv"], peers=False, **words)
    assert {row["implementation"] for row in rows} == {"chela reference"}
    assert table(console).count("/ours") == 2, "no column for peers where there are none"


def test_peers_that_tune_themselves_meet_shapes_that_are_timed():
    attention, _ = SUITES["linear-attention"]
    for shape in FEW:
        assert shape in attention.shapes["cuda"]
    fla = [c for c in attention.contenders if c.package == "fla"]
    assert len(fla) == 2
    for contender in fla:
        taken = [s for s in attention.shapes["cuda"] if contender.takes(s, torch.device("cuda"))]
        assert len(taken) == len(FEW)
    (sdpa,) = [c for c in attention.contenders if "SDPA" in c.name]
    assert max(s["T"] for s in attention.shapes["cuda"] if sdpa.takes(s, torch.device("cuda"))) == 16_384
    lengths = {s["T"] for s in attention.shapes["cuda"] if s["H"] == 8}
    assert {min(lengths), max(lengths)} == {128, 2**20}
    assert {s["B"] * s["T"] for s in attention.shapes["cuda"] if s["T"] <= 2**17} == {2**17}


def test_how_far_the_time_of_a_token_depends_on_the_length_is_said(tmp_path, console, monkeypatch):
    _, flat = SUITES["linear-attention"]
    for shapes in flat.shapes.values():
        assert len({s["B"] * s["T"] for s in shapes}) == 1
    assert {s["T"] for s in flat.shapes["cuda"]} >= {2**14, 2**20}
    times = iter([9.0, 18.0, 9.9, 27.0])  # forward and both, at one length and the other
    monkeypatch.setattr(bench, "measure", lambda *words: Time(next(times), 0.0, 99.0, 3))
    axes = {"H": 2, "K": 4, "V": 4}
    run_bench(
        ["linear-attention"], out=tmp_path / "b.csv", device="cpu", console=console, peers=False,
        shapes={"linear-attention": (), flat.op: ({"B": 2, "T": 45} | axes, {"B": 1, "T": 90} | axes)},
    )  # fmt: skip
    text = " ".join(table(console).split())
    assert "chela reference, forward: 100,000.00 to 110,000.00 ns a token from T 45 to 90, flat to 10.0 %" in text
    assert (
        "chela reference, forward+backward: 200,000.00 to 300,000.00 ns a token from T 45 to 90, flat to 50.0 %" in text
    )


def test_plots_of_all_lengths_are_written_beside_the_table(tmp_path, console):
    shapes = tuple({"B": 1, "T": t, "H": 2, "K": 4, "V": 4} for t in (8, 16, 64))
    out = tmp_path / "b.csv"
    run_bench(["linear-attention"], out=out, device="cpu", seconds=0, shapes=SHAPES | {"linear-attention": shapes},
              console=console)  # fmt: skip
    plot = tmp_path / "b-linear-attention-H2-K4-V4"
    assert f"plot:{plot}.svgand.png" in "".join(table(console).split())
    assert plot.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    svg = plot.with_suffix(".svg").read_text(encoding="utf-8")
    for words in ("linear-attention, H2 K4 V4", "chela reference", "torch SDPA, softmax", "floor: a copy"):
        assert f"<!-- {words}" in svg  # text is drawn as paths, with the words in a comment
    # every measurement is a point of its curve, lost or won: 3 lengths, 2 contenders, 2 passes, 2 measures
    assert svg.count("<use xlink:href") >= 3 * 2 * 2 * 2


def test_no_plot_without_matplotlib_or_without_several_lengths(tmp_path, console, monkeypatch):
    rows = run_bench(["short-conv"], out=tmp_path / "b.csv", device="cpu", seconds=0, shapes=SHAPES, console=console)
    assert bench_plot.write(rows, tmp_path / "b.csv") == []
    longer = [row | {"shape": str(row["shape"]).replace("T9", "T18")} for row in rows]
    monkeypatch.setattr(bench_plot, "available", lambda: False)
    (line,) = bench_plot.write(rows + longer, tmp_path / "b.csv")
    assert line == "no plots: matplotlib is not installed (install chela[plot])"
    monkeypatch.setattr(bench_plot, "available", curves.available)
    assert len(bench_plot.write(rows + longer, tmp_path / "b.csv")) == 1


@pytest.mark.gpu
def test_times_on_a_gpu_are_the_devices_own():
    device = torch.device("cuda")
    small, large = torch.zeros(8, device=device), torch.zeros(2**29, dtype=torch.uint8, device=device)

    def many_launches():
        for _ in range(20):
            small.add_(1)

    assert measure(many_launches, device, 0.1).median < 0.2  # 20 kernels of a few microseconds, not of their launches
    speed = copy_speed(device)
    once = measure(lambda: large.add_(1), device, 0.1).median
    assert 0.5 < 2 * large.nbytes / (once / 1000) / speed < 1.5


def test_a_copy_has_a_speed():
    assert 1e8 < copy_speed(CPU, 0) < 1e13


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


def test_training_updates_are_checked_timed_and_plotted(tmp_path, console):
    shapes: dict[str, tuple[dict[str, int], ...]] = {"training": ({"B": 2, "T": 16}, {"B": 1, "T": 32})}
    rows = run_bench(["training"], out=tmp_path / "b.csv", device="cpu", seconds=0, shapes=shapes, console=console)
    assert len(rows) == 6
    assert {row["implementation"] for row in rows} == {"chela", "Transformer, SDPA", "convolutions by FFT"}
    for row in rows:
        assert row["op"] == "training step"
        assert float(str(row["median_ms"])) > 0
        assert float(str(row["tokens_per_s"])) == pytest.approx(32e3 / float(str(row["median_ms"])), rel=1e-3)
        assert bool(row["worst_relative_error"]) == (row["implementation"] == "chela")
    assert (tmp_path / "b-training-step-D128.png").is_file()


def test_generation_is_checked_timed_and_plotted(tmp_path, console):
    shapes: dict[str, tuple[dict[str, int], ...]] = {"generation": ({"B": 1, "T": 32}, {"B": 2, "T": 300})}
    rows = run_bench(["generation"], out=tmp_path / "b.csv", device="cpu", seconds=0, shapes=shapes, console=console)
    assert [(row["implementation"], row["pass"]) for row in rows] == [
        *[("chela", "prefill"), ("chela", "step")] * 2,
        *[("Transformer, SDPA", "prefill"), ("Transformer, SDPA", "step")] * 2,
    ]
    for row in rows:
        tokens = {"B1 T32 D64": (32, 1), "B2 T300 D64": (600, 2)}[str(row["shape"])][row["pass"] == "step"]
        assert float(str(row["tokens_per_s"])) == pytest.approx(1e3 * tokens / float(str(row["median_ms"])), rel=1e-3)
        assert 0 < float(str(row["worst_relative_error"])) < 1e-5
    last = {row["implementation"]: float(str(row["row_mib"])) for row in rows if row["shape"] == "B2 T300 D64"}
    assert last["Transformer, SDPA"] == pytest.approx(300 * 2 * 2 * 64 * 4 / 2**20, rel=1e-3), "keys and values"
    assert last["chela"] < last["Transformer, SDPA"]
    assert (tmp_path / "b-generation-D64.png").is_file()


def test_a_prompt_in_pieces_and_one_that_does_not_fit(tmp_path, monkeypatch, console):
    monkeypatch.setattr(bench_generation, "PIECE", 16)
    read = bench_generation._read

    def short_of_memory(model, tokens, piece):
        if model.config.mixer == "transformer":
            raise torch.OutOfMemoryError
        assert piece == 16
        return read(model, tokens, piece)

    monkeypatch.setattr(bench_generation, "_read", short_of_memory)
    rows = bench_generation.bench_generation(CPU, torch.float32, 0, shapes=({"B": 1, "T": 40},), console=console)
    assert {row["implementation"] for row in rows} == {"chela"}
    assert "Transformer, SDPA at B1 T40: out of memory" in table(console)


@pytest.mark.parametrize("name", bench_generation.entrants("cpu"))
def test_wrong_steps_are_not_timed(monkeypatch, name):
    monkeypatch.setattr(bench_generation.Decoder, "step", lambda self, token: torch.ones(len(token), 256))
    with pytest.raises(AssertionError, match="off the whole forward's"):
        bench_generation.check(bench_generation.entrants("cpu")[name], CPU, torch.float32)


def test_a_wrong_update_is_not_timed(monkeypatch):
    plain = bench_training.make_update

    def wrong(learner):
        if learner.run.train.compile:
            with torch.no_grad():
                learner.model.head.weight.mul_(1.01)
        return plain(learner)

    monkeypatch.setattr(bench_training, "make_update", wrong)
    with pytest.raises(AssertionError, match="off the plain update's"):
        bench_training.check(CPU, torch.float32)
