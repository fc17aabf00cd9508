import re
from dataclasses import replace

import pytest
import torch

from chela.evaluation import selftest as module
from chela.evaluation.doctor import diagnose
from chela.evaluation.selftest import CASES, known_issues, selftest
from chela.ops.impl import WITH_TRITON
from cli_kit import chela, succeed  # pyrefly: ignore

CPU = torch.device("cpu")
here = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are tested")


@here
def test_without_a_gpu_the_reference_is_tested_and_it_says_so(tmp_path):
    out = succeed("doctor", "--selftest", "--root", tmp_path)
    first, *lines, last = out.split("\n\n")[-1].strip().splitlines()
    assert first == "no GPU to test kernels on: the reference on the CPU in float32, against float64:"
    assert len(lines) == len(CASES["cpu"])
    for line in lines:
        match = re.fullmatch(r"PASS  \w+ +.+  worst relative error (\S+) \(.+\), [\d.]+ s", line)
        assert match, line
        assert 0 < float(match.group(1)) < 1e-5
    assert re.fullmatch(rf"{len(lines)} of {len(lines)} passed, [\d.]+ s", last)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_op_with_kernels_has_a_case(kind):
    assert {case.op for case in CASES[kind]} == WITH_TRITON


@here
def test_a_wrong_op_fails_and_so_does_the_command(tmp_path, monkeypatch):
    good, *rest = CASES["cpu"]

    def wrong(**inputs):
        out, after = good.run(**inputs)
        assert after is not None
        return out, after * (1 + 1e-5)

    def broken(**inputs):
        raise RuntimeError("no such\ninstruction")

    cases = (replace(good, run=wrong), replace(good, run=broken), *rest)
    monkeypatch.setattr(module, "CASES", {"cpu": cases})
    code, out, _ = chela("doctor", "--selftest", "--root", tmp_path)
    assert code == 1
    assert re.search(r"^FAIL  linear_attention .* state: largest error .*, budget .* s$", out, re.MULTILINE)
    assert re.search(r"^FAIL  linear_attention .* RuntimeError: no such instruction, .* s$", out, re.MULTILINE)
    assert f"{len(rest)} of {len(cases)} passed" in out


@pytest.mark.parametrize("case", CASES["cpu"], ids=lambda case: f"{case.op} {case.what}")
def test_cases_fit_the_kernels_too(case, nan_memory):
    """In the interpreter, in the precision closest to a GPU's own."""
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    verdict, finding = module._judge(case, "triton", torch.float16, device)
    assert verdict == "PASS", finding


@pytest.mark.gpu
def test_the_kernels_pass_on_this_gpu_within_a_minute():
    lines: list[str] = []
    assert selftest(torch.device("cuda"), write=lines.append) == 0, lines
    passed = re.fullmatch(r"(\d+) of \1 passed, ([\d.]+) s", lines[-1])
    assert passed
    assert float(passed.group(2)) < 60


@pytest.mark.parametrize(
    ("capability", "triton", "bad", "untested"),
    [
        (None, "3.6.0", False, False),
        ((9, 0), "3.3.1", False, False),
        ((9, 0), "3.4.0", True, False),
        ((9, 0), "3.6.0+git1a2b", True, False),
        ((9, 0), "3.7.0", True, False),
        ((9, 0), "3.7.1", False, False),
        ((9, 0), "", False, False),
        ((8, 0), "3.6.0", False, True),
        ((8, 9), "3.6.0", False, True),
        ((10, 0), "3.8.0", False, True),
        ((12, 0), "3.6.0", False, True),
    ],
)
def test_pairs_of_gpu_and_triton_known_to_be_bad(capability, triton, bad, untested):
    (_, hopper), (_, others) = known_issues(capability, triton)
    assert "known bad" in hopper
    assert "untested" in others
    assert hopper.startswith("this machine: ") == bad
    assert others.startswith("this machine: ") == untested


def test_the_doctor_knows_them_too(tmp_path):
    rows = [(name, text) for part, name, text in diagnose(tmp_path) if part == "GPUs and Triton"]
    assert [name for name, _ in rows] == [name for name, _ in known_issues(None, "")]


def test_kernels_are_compiled_side_by_side_before_the_cases(monkeypatch):
    """Of three kernels one cannot be compiled: the others are, and its case will say so."""
    compiled = []

    class Kernel:
        def preload(self, how):
            if how == "broken":
                raise RuntimeError("no such instruction")
            compiled.append(how)

    ran = []

    def would_compile(act):
        act()
        return [(Kernel(), how) for how in ("first", "broken", "last")]

    monkeypatch.setattr(module, "would_compile", would_compile)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(module, "values_and_gradients", lambda op, inputs: ran.append(op) or 1 / 0)
    module._compile(CASES["cpu"], torch.float32, torch.device("cpu"))
    assert len(ran) == len(CASES["cpu"])
    assert sorted(compiled) == ["first", "last"]
