import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import chela as package
from chela.cli import commands, main
from chela.evaluation.runs import read_run
from chela.models.files import read_weights
from chela.presets import PRESETS
from cli_kit import SMALL, chela, contents, refuse, succeed, train_bytes, train_digits, write_texts  # pyrefly: ignore


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "run"
    train_digits(folder)
    return folder


@pytest.fixture(scope="module")
def bytes_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("bytes")
    write_texts(root)
    train_bytes(root / "run", root)
    return root / "run"


@pytest.fixture
def run(digits_run, tmp_path):
    return shutil.copytree(digits_run, tmp_path / "run")


# What is asked for happens


def test_training_writes_the_run_and_prints_the_result_beside_the_baseline_and_the_report(tmp_path):
    out = train_digits(tmp_path / "run")
    files = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert files == {"config.toml", "metrics.jsonl", "model.safetensors", "checkpoint", "report.html"}
    assert "there is no published split" in (tmp_path / "run" / "report.html").read_text(), "what to know of the data"
    recorded = read_run(tmp_path / "run").test
    assert recorded is not None
    assert f"{100 * recorded['accuracy']:.2f} %" in out
    assert re.search(r"^digits, seed 0 +done +\d+\.\d\d % ", out, re.MULTILINE), "the table of results"
    assert re.search(r"^majority class +baseline +10\.03 %", out, re.MULTILINE)
    assert out.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    assert "\x1b" not in out, "no colours or cursor movements where there is no terminal"


def test_the_run_goes_to_its_own_folder_when_none_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    succeed("train", "digits", *SMALL, "--seed", 3)
    assert (tmp_path / "runs" / "digits-seed3" / "model.safetensors").is_file()


def test_a_home_folder_that_the_shell_left_as_it_was_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    train_digits(Path("~/run"))  # as of --out=~/run
    assert (tmp_path / "home" / "run" / "model.safetensors").is_file()
    assert not (tmp_path / "~").exists()


def test_a_folder_whose_name_is_no_utf8_is_refused(tmp_path):
    line = refuse(tmp_path, "train", "digits", *SMALL, "--out", f"{tmp_path}/a\udcff")
    assert "is not UTF-8, and config.toml could not name it" in line


def test_a_second_training_says_that_the_run_is_done_and_changes_nothing(run):
    before = contents(run)
    out = train_digits(run)
    assert "already done" in out
    assert "report:" in out
    after = contents(run)
    assert {k: v for k, v in after.items() if k != "report.html"} == {
        k: v for k, v in before.items() if k != "report.html"
    }


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path, digits_run):
    train_digits(tmp_path / "run", "--train.time-limit", "0.001s")
    stopped = read_run(tmp_path / "run")
    assert stopped.status == "stopped"
    assert stopped.step == 1
    assert "going on from step 1 of 4" in train_digits(tmp_path / "run")
    ours, theirs = (read_weights(folder / "model.safetensors")[1] for folder in (tmp_path / "run", digits_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_evaluation_repeats_the_test_of_the_training(run):
    recorded = read_run(run).test
    assert recorded is not None
    before = contents(run)
    out = succeed("eval", run)
    assert f"accuracy {100 * recorded['accuracy']:.2f} %, loss {recorded['loss']:.4f}" in out
    assert "359 examples" in out
    assert "majority class" in out
    assert "179 examples" in succeed("eval", run, "--split", "val", "--batch-size", 7)
    assert contents(run) == before


def test_generation_writes_prompt_and_text_and_the_seed_decides(bytes_run):
    words = ("generate", bytes_run, "--prompt", "the cat", "--max-new-tokens", 20)
    code, out, err = chela(*words)
    assert code == 0
    assert out.startswith("the cat")
    assert len(out.encode()) > len("the cat")
    assert re.fullmatch(r"\n20 tokens, [\d,]+ a second\n", err)
    assert chela(*words)[1] == out
    assert chela(*words, "--seed", 1)[1] != out


def test_generation_ends_before_a_stop_string(bytes_run):
    words = ("generate", bytes_run, "--prompt", "the cat", "--max-new-tokens", 40)
    whole = chela(*words)[1].removeprefix("the cat").removesuffix("\n")
    stop = whole[5:7]
    code, out, err = chela(*words, "--stop", "never to be seen", stop)
    assert code == 0
    assert out.rstrip("\n") == "the cat" + whole.split(stop, 1)[0]
    assert int(err.split()[0]) < 40, "nothing is computed for a text that has ended"


def test_data_lists_the_tasks_and_describes_one(tmp_path):
    assert {line.split()[0] for line in succeed("data").splitlines()} >= {"digits", "listops", "text", "image", "bytes"}
    out = succeed("data", "digits", "--root", tmp_path)
    assert "1,259 training, 179 validation, 359 test examples" in out
    assert "majority class" in out


def test_reports_land_in_the_folder_of_one_run_and_here_for_several(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run / "report.html").unlink()
    assert str(run / "report.html") in succeed("report", run)
    other = shutil.copytree(run, tmp_path / "other")
    out = succeed("report", run, other)
    assert out.splitlines()[-1] == "report: report.html"
    assert re.search(r"^digits +2 of 2 done +[\d.]+ %", out, re.MULTILINE), "one seed has no deviation"
    assert (tmp_path / "report.html").is_file()
    assert "p.html" in succeed("report", run, "--out", tmp_path / "p.html")
    out = succeed("report", run, "--out", tmp_path / "p.html", "--pictures", tmp_path / "pictures" / "digits")
    assert "digits-minutes.svg" in out
    parts = {f"digits-{part}{against}" for part in ("", "loss-") for against in ("steps", "tokens", "minutes")}
    assert {path.stem for path in (tmp_path / "pictures").glob("*.svg")} == parts, "a new journal knows them all"


def test_doctor_shows_versions_devices_and_the_choice_for_every_op(tmp_path):
    out = succeed("doctor", "--root", tmp_path)
    for word in (package.__version__, torch.__version__, "linear_attention", "feed_forward", "reference"):
        assert word in out


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_the_overview_names_every_command(words):
    out = succeed(*words)
    for name in commands.COMMANDS:
        assert re.search(rf"^  {name} ", out, re.MULTILINE)


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_explains_itself(name):
    out = succeed(name, "--help")
    assert out.startswith("usage: chela " + name)
    if name == "train":
        assert all(f"\n  {preset} " in out for preset in PRESETS)


def test_the_help_of_a_preset_shows_every_setting_with_its_value():
    out = succeed("train", "digits", "--help")
    for option in ("--seed", "--model.d-model", "--data.root", "--optim.kernel-lr", "--train.time-limit"):
        assert option in out
    assert "(default: 0.003)" in out


def test_the_version():
    assert succeed("--version") == f"chela {package.__version__}\n"


# What cannot be done is said in one line


LINES = {
    "trainn digits": r"unknown command 'trainn' \(did you mean 'train'\?\); commands: train, eval",
    "train": r"the preset comes first: chela train PRESET \[options\]; presets: digits, ",
    "train --seed 1": r"the preset comes first",
    "train lisotps": r"unknown preset 'lisotps' \(did you mean 'listops'\?\); presets: digits, ",
    "train digits --model.d-modle 8": r"unknown option --model.d-modle \(did you mean '--model.d-model'\?\)",
    "train digits --sed=1": r"unknown option --sed \(did you mean '--seed'\?\)",
    "train digits --train.steps many": r"--train.steps wants a whole number: 'many'",
    "train digits --optim.lr fast": r"--optim.lr wants a number: '?fast",
    "train digits --model.norm best": r"--model.norm is one of 'layer', 'rms', 'scale', 'batch'; got 'best'",
    "train digits --seed": r"--seed wants a value",
    "train digits --seed -1": r"seed must lie between 0 and 2\^63 - 1, got -1",
    "train digits --seed 9999999999999999999": r"seed must lie between 0 and 2\^63 - 1, got 9999999999999999999",
    "train digits --optim.lr inf": r"optim.lr must be positive and finite, got inf",
    "train digits --optim.eps -1": r"optim.eps must be positive and finite, got -1",
    "train digits --optim.clip nan": r"optim.clip must be finite and not negative, got nan",
    "train digits --model.causal true": r"--model.causal takes no value: write --model.causal or --model.no-causal",
    "train digits now": r"unexpected argument 'now'",
    "train digits --model.dropout 2": r"model.dropout must lie in \[0, 1\), got 2",
    "train digits --model.d-value 9 --model.heads 2": r"model.d_value 9 is not a multiple of model.heads 2",
    "train digits --train.time-limit 1..5m": r"a duration looks like 90s, 9m or 1h30m; got '1\.\.5m'",
    "train digits --train.time-limit .s": r"a duration looks like 90s, 9m or 1h30m; got '\.s'",
    "train digits --model.branches wide": r"--model.branches does not take \['wide'\]",
    "train digits --train.time-limit 9x": r"a duration looks like 90s, 9m or 1h30m; got '9x'",
    "train digits --model.kernel-length 32": r"64 tokens are longer than model.kernel_length 32; set --model.kernel-le",
    "train digits --model.classes 9": r"model.classes is 9, but task digits needs 10: set --model.classes 10",
    "train digits --model.inputs tokens": r"model.inputs is tokens, but task digits needs real",
    "train digits --train.batch-size 8 --train.accumulate 3": r"must be a multiple of 3",
    "train digits --data.task digit": r"unknown task 'digit' \(did you mean 'digits'\?\)",
    "train text --data.root DATA": r"no data for text: put .* into DATA/text, or name .* with --data.root",
    "train image --data.root DATA": r"no data for image: put data_batch_1.bin .*cs.toronto.edu.* into DATA/image",
    "train lm-tiny --data.root DATA": r"no data for bytes: put train.txt, valid.txt and test.txt",
    "train pathfinder --data.root DATA --data.examples 7": r"data.examples is 7, at least 8 are needed",
    "train digits --data.distractors 3": r"--data.distractors is 3: only pathfinder and path-x have them",
    "data digits --show": r"--show draws pathfinder and path-x, not digits",
    "train retrieval --data.root DATA": r"no data for retrieval: put new_aan_pairs.* or name .* with --data.root",
    "train image --data.encoding bytes": r"--data.encoding is bytes: image takes real or tokens",
    "train speech --data.rate 44100": r"--data.rate is 44100: speech takes 16000 or 8000",
    "train image --data.max-length 64": r"--data.max-length is 64: all sequences of image have the same length",
    "train text --data.encoding words": r"--data.encoding is one of .*'bytes', 'bpe', 'characters', 'real', 'tokens'",
    "train digits --out file": r"file is a file, not a folder: give the run another --out",
    "eval": r"RUN is missing",
    "eval nowhere": r"nowhere/config.toml does not exist: is nowhere the folder of a run\?",
    "eval file": r"file/config.toml does not exist: is file the folder of a run",
    "eval folder --split dev": r"--split is one of 'test', 'val', 'train'; got 'dev'",
    "generate nowhere --prompt a": r"nowhere/config.toml does not exist",
    "generate nowhere": r"--prompt is missing",
    "data digit": r"unknown task 'digit' \(did you mean 'digits'\?\); tasks: digits, ",
    "data text --root DATA": r"no data for text: put .*aclImdb_v1.tar.gz.*DATA/text, or name .* with --root$",
    "data speech --root DATA": r"no data for speech: put the unpacked speech_commands_v0.02.tar.gz .* DATA/speech",
    "data digits --encoding bytes": r"--encoding is bytes: digits has one form alone",
    "data speech --rate -1": r"--rate must not be negative, got -1",
    "data listops --max-length 9 --min-length 9": r"--min-length 9 and --max-length 9 leave no lengths",
    "bench short-con": r"unknown op 'short-con' \(did you mean 'short-conv'\?\)",
    "bench short-conv --seconds -1": r"seconds must not be negative, got -1",
    "bench short-conv --out nowhere/table.csv": r"cannot write nowhere/table.csv: No such file or directory",
    "report": r"name at least one run",
    "report folder": r"folder/config.toml does not exist",
    "report nowhere": r"nowhere/config.toml does not exist",
}


@pytest.mark.parametrize("line", LINES)
def test_mistakes_get_one_line_and_change_nothing(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    message = refuse(tmp_path, *line.split())
    assert re.search(LINES[line], message), message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("words", [("train", "digits", "--train.device"), ("bench", "--device")])
def test_a_gpu_that_is_not_there(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "torch sees no CUDA GPU here" in refuse(tmp_path, *words, "cuda")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # the last tensor's last number but one
    path.write_bytes(content)


def edit(old, new):
    def change(path):
        text = path.read_text()
        assert text.count(old) >= 1
        path.write_text(text.replace(old, new, 1))

    return change


DAMAGE = {
    "truncated weights": ("model.safetensors", truncate, r"model.safetensors is truncated or not a safetensors file"),
    "flipped bit": (
        "model.safetensors",
        flip,
        r"the weights in .*model.safetensors are not those that were saved: the file was edited or damaged",
    ),
    "empty weights": ("model.safetensors", lambda path: path.write_bytes(b""), r"model.safetensors is truncated"),
    "other file": ("model.safetensors", lambda path: path.write_text("hello " * 99), r"not a safetensors file"),
    "missing weights": ("model.safetensors", lambda path: path.unlink(), r"has not reached its first validation"),
    "changed width": ("config.toml", edit("d_model = 8", "d_model = 16"), r"model.d_model was 8, now 16"),
    "unknown key": ("config.toml", edit("d_model = 8", "d_modle = 8"), r"unknown key model.d_modle \(did you mean"),
    "wrong type": ("config.toml", edit("d_model = 8", 'd_model = "8"'), r"model.d_model must be int, got '8'"),
    "out of range": ("config.toml", edit("dropout = 0.1", "dropout = 1.5"), r"model.dropout must lie in"),
    "no TOML": ("config.toml", lambda path: path.write_text("d_model 8"), r"config.toml: Expected"),
    "emptied": ("config.toml", lambda path: path.write_text(""), r"config.toml: the file is empty"),
    "no text": ("config.toml", lambda path: path.write_bytes(b"\xff\xfe\x00"), r"config.toml: "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_not_evaluated(damage, run, tmp_path):
    name, change, message = DAMAGE[damage]
    change(run / name)
    line = refuse(tmp_path, "eval", run)
    assert re.search(message, line), line


@pytest.mark.parametrize("damage", [name for name, (file, _, _) in DAMAGE.items() if file == "config.toml"])
def test_a_run_whose_settings_were_edited_is_not_gone_on_with(damage, run, tmp_path):
    name, change, message = DAMAGE[damage]
    change(run / name)
    line = refuse(tmp_path, "train", "digits", *SMALL, "--out", run)
    assert re.search(message.replace("was 8, now 16", "was 16, now 8"), line), line


@pytest.mark.parametrize("damage", [truncate, flip], ids=["truncated", "flipped bit"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_not_gone_on_with(name, damage, tmp_path):
    run = tmp_path / "run"
    train_digits(run, "--train.time-limit", "0.001s")
    checkpoint = run / "checkpoint" / "step-00000001"
    damage(checkpoint / name)
    line = refuse(tmp_path, "train", "digits", *SMALL, "--out", run)
    assert "missing, truncated or edited: delete the folder" in line
    assert str(checkpoint) in line


def test_an_edited_journal_is_named_with_its_line(run, tmp_path):
    edit('"kind": "val"', "kind: val")(run / "metrics.jsonl")
    for words in (("report", run), ("train", "digits", *SMALL, "--out", run)):
        assert re.search(r"metrics.jsonl, line \d+, is not a line of a journal", refuse(tmp_path, *words))


def test_other_settings_in_the_folder_of_a_run(run, tmp_path):
    line = refuse(tmp_path, "train", "digits", *SMALL, "--out", run, "--optim.lr", "0.5")
    assert "optim.lr was 0.003, now 0.5" in line
    assert "give this run another --out, or delete" in line


def test_longer_sequences_than_the_kernel_in_evaluation(tmp_path):
    (tmp_path / "listops").mkdir()
    tree = "\t".join(("( [MAX 1 2 3 ] )", "3"))
    for name in ("train", "val", "test"):
        (tmp_path / "listops" / f"basic_{name}.tsv").write_text(f"Source\tTarget\n{tree}\n")
    words = (*SMALL, "--data.root", tmp_path, "--data.min-length", 0, "--data.max-length", 0, "--data.examples", 0)
    succeed("train", "listops-tiny", *words, "--model.kernel-length", 5, "--out", tmp_path / "run")
    long = "\t".join(("( [MAX 1 2 3 4 5 ] )", "5"))
    (tmp_path / "listops" / "basic_test.tsv").write_text(f"Source\tTarget\n{long}\n")
    code, _, err = chela("eval", tmp_path / "run")
    assert code == 2
    assert "longer than model.kernel_length 5" in err


def test_a_symbol_that_is_none_in_the_published_files(tmp_path):
    (tmp_path / "listops").mkdir()
    for name in ("train", "val", "test"):
        (tmp_path / "listops" / f"basic_{name}.tsv").write_text("Source\tTarget\n[MAX 1 12 3 ]\t12\n")
    line = refuse(tmp_path, "data", "listops", "--root", tmp_path)
    assert "basic_train.tsv line 2" in line
    assert "'12'" in line


@pytest.mark.parametrize("damage", ["edited", "truncated"])
def test_prepared_data_that_were_changed_since(damage, tmp_path):
    words = ("train", "listops-tiny", *SMALL, "--data.root", tmp_path, "--data.examples", 200)
    succeed(*words, "--out", tmp_path / "run")
    (path,) = (tmp_path / "prepared").glob("*/tokens.npy")
    if damage == "edited":
        np.save(path, np.full_like(np.load(path), 200))
    else:
        truncate(path)
    for line in (("eval", tmp_path / "run"), (*words, "--out", tmp_path / "other")):
        message = refuse(tmp_path, *line)
        assert "unknown symbols: delete" in message or "prepared data are damaged" in message


def test_a_loss_that_is_not_finite_names_the_layer_and_keeps_the_checkpoint(tmp_path):
    train_digits(tmp_path / "run", "--train.time-limit", "0.001s")
    kept = contents(tmp_path / "run" / "checkpoint")
    words = (*SMALL, "--optim.lr", "1e30", "--optim.clip", "0", "--train.steps", "40", "--out", tmp_path / "wild")
    code, _, err = chela("train", "digits", *words)
    assert code == 2
    assert err.count("\n") == 1
    assert re.search(r"became infinite or NaN at step \d+, first in (the output|the gradient) of \S+", err), err
    assert read_run(tmp_path / "wild").status == "failed"
    assert contents(tmp_path / "run" / "checkpoint") == kept


GENERATE = {
    "--max-new-tokens 0": "max-new-tokens must be at least 1, got 0",
    "--temperature -1": "temperature must be finite and not negative",
    "--temperature nan": "temperature must be finite and not negative",
    "--top-k -1": "top-k must not be negative",
    "--top-p 0": r"top-p must lie in \(0, 1\], got 0",
    "--repetition-penalty 0": r"repetition-penalty must be positive and finite \(1 leaves the logits alone\), got 0",
    "--repetition-penalty much": r"--repetition-penalty wants a number: 'much'",
    "--device tpu": "--device is one of 'auto', 'cpu', 'cuda'; got 'tpu'",
}


@pytest.mark.parametrize("words", GENERATE)
def test_options_of_generation_out_of_range(words, bytes_run):
    line = refuse(bytes_run, "generate", bytes_run, "--prompt", "a", *words.split())
    assert re.search(GENERATE[words], line), line


def test_nothing_to_generate(bytes_run, digits_run):
    words = ("generate", bytes_run, "--prompt", "a", "--stop", "b", "")
    assert "a stop string needs at least one character: leave --stop out" in refuse(bytes_run, *words)
    assert "a prompt needs at least one token" in refuse(bytes_run, "generate", bytes_run, "--prompt", "")
    assert "holds a classifier, not a language model" in refuse(digits_run, "generate", digits_run, "--prompt", "a")


def test_batch_sizes_below_zero(digits_run):
    assert "batch-size must not be negative" in refuse(digits_run, "eval", digits_run, "--batch-size", -1)


# Exit codes


def test_the_process_carries_code_and_line(tmp_path):
    command = [sys.executable, "-m", "chela"]
    done = subprocess.run([*command, "train", "lisotps"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("chela: unknown preset 'lisotps' (did you mean 'listops'?)")
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())


def test_our_own_mistakes_are_shown_whole_and_give_1(tmp_path):
    script = "import sys; from chela import cli; cli._run = lambda words: 1 / 0; sys.exit(cli.main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_torch_starts_with_threads_that_sleep_while_they_wait(tmp_path):
    script = """if True:
        import os, sys
        from chela import cli
        cli.main(["--version"])
        assert "torch" not in sys.modules
        assert os.environ["OMP_WAIT_POLICY"] == sys.argv[1]"""
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
        assert subprocess.run([sys.executable, "-c", script, expected], env=environment, cwd=tmp_path).returncode == 0


def test_interrupted_before_training_gives_130(monkeypatch):
    def stop(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("chela.cli._run", stop)
    assert chela("doctor") == (130, "", "chela: interrupted\n")


def test_a_ctrl_c_that_a_library_met_while_it_was_imported_gives_130(monkeypatch):
    def stop(words):
        try:
            raise KeyboardInterrupt
        finally:
            raise AttributeError("module 'half' has no attribute 'whole'")

    monkeypatch.setattr("chela.cli._run", stop)
    assert chela("doctor") == (130, "", "chela: interrupted\n")


def test_memory_that_is_not_there_is_said_in_one_line_with_what_to_do(monkeypatch):
    gpu = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(2**60, dtype=torch.uint8)
    for error, more in (
        (torch.OutOfMemoryError(gpu), " (20.00 GiB more were asked for)"),
        (cpu.value, f" ({2**60} bytes more were asked for)"),
        (RuntimeError("CUDA error: out of memory"), ""),
        (MemoryError(), ""),
    ):
        monkeypatch.setattr("chela.cli._run", functools.partial(fail, error))
        code, out, err = chela("train", "digits")
        assert (code, out) == (2, "")
        assert err.startswith(f"chela: out of memory{more}: train with a smaller --train.batch-size, ")
        assert err.count("\n") == 1
    monkeypatch.setattr("chela.cli._run", functools.partial(fail, RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        chela("doctor")


def fail(error, words):
    raise error


def test_files_that_may_not_be_read_and_full_disks_are_said_in_one_line(monkeypatch):
    for error, line in (
        (PermissionError(13, "Permission denied", "texts/train.txt"), "cannot use texts/train.txt: Permission denied"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ):
        monkeypatch.setattr("chela.cli._run", lambda words, error=error: (_ for _ in ()).throw(error))
        assert chela("doctor") == (2, "", f"chela: {line}\n")


def test_letters_that_the_terminal_does_not_have_and_prompts_that_are_no_utf8(bytes_run):
    command = [sys.executable, "-m", "chela", "generate", bytes_run, "--prompt", b"\xe4 \xff", "--max-new-tokens", "3"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert (done.returncode, done.stdout[:3]) == (0, b"? ?"), done.stderr


def test_a_reader_that_has_gone_is_no_mistake(tmp_path):
    command = f"{sys.executable} -c 'import sys; from chela.cli import main; sys.exit(main([\"data\"]))'"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_main_takes_the_words_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chela", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"chela {package.__version__}\n"


def test_the_journal_holds_what_was_printed(digits_run):
    kinds = [json.loads(line)["kind"] for line in (digits_run / "metrics.jsonl").read_text().splitlines()]
    assert kinds[0] == "start"
    assert kinds[-2:] == ["test", "end"]
