"""What others may build on: names, signatures, options, keys of weights, and an import that waits for nothing.

A failure here means a change that breaks somebody's code or files: say so in CHANGELOG.md, then change the lists.
"""

import importlib
import inspect
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import chela
from chela.cli.commands import COMMANDS
from chela.cli.parse import options
from chela.config import ModelConfig
from chela.data import TASKS
from chela.presets import PRESETS

SOURCE = Path(chela.__file__).parent

EXPORTS = {
    "chela": "CausalLM ChelaState Classifier ModelConfig RunConfig TwoTowerClassifier __version__ build preset",
    "chela.ops": (
        "linear_attention linear_attention_step long_conv long_conv_online_state long_conv_step "
        "short_conv short_conv_step"
    ),
    "chela.layers": "ChelaBlock ChelaLayer GatedLinearAttention LayerState ShortLongConv ShortLongState",
    "chela.models": "CausalLM ChelaState Classifier TwoTowerClassifier build load_model save_model",
}

SIGNATURES = {
    "linear_attention": (
        "q, k, v, *, causal=True, scale=1.0, decay=None, state=None, return_state=False, cu_seqlens=None, silu=False, "
        "impl='auto'"
    ),
    "linear_attention_step": "q, k, v, state, *, scale=1.0, decay=None, inplace=False, impl='auto'",
    "short_conv": (
        "x, weight, bias=None, *, causal=True, activation=None, state=None, return_state=False, cu_seqlens=None, "
        "impl='auto'"
    ),
    "short_conv_step": "x, weight, bias=None, *, state, activation=None, impl='auto'",
    "long_conv": (
        "x, kernel, *, reverse_kernel=None, causal=True, state=None, return_state=False, cu_seqlens=None, impl='auto'"
    ),
    "long_conv_step": "x, kernel, *, state, impl='auto'",
    "long_conv_online_state": "inputs, kernel, *, clock=0, block=64, epoch=None",
}

OPTIONS = {
    "train": (
        "--seed --out"
        " --model.kind --model.inputs --model.vocab --model.channels --model.classes --model.layers --model.mixer"
        " --model.d-model --model.d-ff --model.feed-forward --model.d-key --model.d-value --model.heads --model.causal"
        " --model.short-width --model.kernel-length --model.kernel --model.taps-per-octave --model.branches"
        " --model.branch-norm --model.squash --model.tap-dropout --model.attention --model.attention-norm"
        " --model.decay --model.norm --model.prenorm --model.dropout --model.token-dropout --model.pooling"
        " --model.merged --data.task --data.root --data.encoding --data.vocab --data.packed --data.rate"
        " --data.max-length --data.min-length --data.examples"
        " --data.distractors --data.seed"
        " --optim.lr --optim.kernel-lr --optim.weight-decay --optim.betas --optim.eps --optim.clip --optim.warmup"
        " --optim.schedule"
        " --train.steps --train.minutes --train.start-from --train.batch-size --train.bucket-batches"
        " --train.pad-multiple --train.label-smoothing --train.ema-decay"
        " --train.length-warmup --train.first-length --train.carry-state --train.accumulate --train.checkpoint-blocks"
        " --train.eval-every --train.eval-batch-size --train.eval-examples"
        " --train.save-every --train.keep --train.log-every --train.tensorboard --train.time-limit"
        " --train.chance-after --train.device --train.dtype --train.compile --train.deterministic"
    ),
    "eval": "--split --data.root --batch-size --device",
    "generate": (
        "--prompt --max-new-tokens --temperature --top-k --top-p --repetition-penalty --stop --seed --device --dtype"
    ),
    "data": (
        "--root --encoding --vocab --packed --rate --max-length --min-length --examples --distractors --seed --show"
    ),
    "bench": "--device --dtype --seconds --peers --out",
    "report": "--out --pictures",
    "doctor": "--root --selftest",
}

SMALL = ModelConfig(layers=1, vocab=5, d_model=8, d_ff=8, d_key=4, d_value=8, kernel_length=16, causal=True)

NORM = "weight bias"
NORMS = ("blocks.0.layer_norm", "blocks.0.feed_forward_norm", "last_norm")
ATTENTION = (
    "q_gain k_gain q_bias k_bias norm_gain from_z.weight from_z.bias from_x.weight from_x.bias out.weight out.bias"
)
LAYER = {
    "blocks.0.layer.convolution": "short_weight short_bias",
    "blocks.0.layer.convolution.kernel": "scale past.0.taps past.1.taps past.2.taps",
    "blocks.0.layer.attention": ATTENTION,
    "blocks.0.layer.gates": "weight bias",
    "blocks.0.feed_forward": "0.weight 0.bias 3.weight 3.bias",
}


def keys(parts: dict[str, str], prefix: str = "backbone.") -> set[str]:
    return {f"{prefix}{part}.{name}" for part, names in parts.items() for name in names.split()}


BACKBONE = keys(LAYER) | keys(dict.fromkeys(NORMS, NORM)) | {"backbone.embedding.tokens.weight"}
HEAD = {"head.weight", "head.bias"}
KINDS = {
    "classifier": BACKBONE | HEAD,
    "causal-lm": BACKBONE | HEAD,
    "two-tower": BACKBONE | {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"},
}

CONVOLUTION = "backbone.blocks.0.layer.convolution.kernel"
STATISTICS = "num_batches_tracked running_mean running_var"
FUTURE = keys({CONVOLUTION: "future.0.taps future.1.taps future.2.taps"}, "")
PAST = keys({CONVOLUTION: "scale past.0.taps past.1.taps past.2.taps"}, "")
# settings: (keys that go, keys that come)
VARIANTS: dict[str, tuple[dict, set[str], set[str]]] = {
    "bidirectional": ({"causal": False}, set(), FUTURE),
    "real": (
        {"inputs": "real"},
        {"backbone.embedding.tokens.weight"},
        {"backbone.embedding.values.weight", "backbone.embedding.values.bias"},
    ),
    "query": ({"pooling": "query"}, set(), {"pooling.query"}),
    "multiscale": ({"kernel": "multiscale"}, set(), set()),
    "branch norm": (
        {"branch_norm": True},
        set(),
        keys({f"{CONVOLUTION}.norms.{i}": f"{NORM} {STATISTICS}" for i in range(3)}, ""),
    ),
    "merged": ({"merged": True}, PAST, {f"{CONVOLUTION}.past"}),
    "merged, bidirectional": (
        {"merged": True, "causal": False},
        PAST,
        {f"{CONVOLUTION}.past", f"{CONVOLUTION}.future"},
    ),
    "batch norm": ({"norm": "batch"}, set(), keys(dict.fromkeys(NORMS, STATISTICS))),
    "rms norm": ({"norm": "rms"}, keys(dict.fromkeys(NORMS, "bias")), set()),
    "scale norm": ({"norm": "scale"}, keys(dict.fromkeys(NORMS, NORM)), keys(dict.fromkeys(NORMS, "gain"))),
    "post-norm": ({"prenorm": False}, keys({"last_norm": NORM}), set()),
    "no attention": ({"attention": False}, keys({"blocks.0.layer.attention": ATTENTION}), set()),
    "decay": ({"decay": True}, set(), {"backbone.blocks.0.layer.attention.decay_logit"}),
    "sum": ({"attention_norm": "sum"}, {"backbone.blocks.0.layer.attention.norm_gain"}, set()),
    "no feed-forward": (
        {"d_ff": 0},
        keys({"blocks.0.feed_forward": "0.weight 0.bias 3.weight 3.bias", "blocks.0.feed_forward_norm": NORM}),
        set(),
    ),
    "no short convolution": (
        {"short_width": 0},
        keys({"blocks.0.layer.convolution": "short_weight short_bias"}),
        set(),
    ),
    "no long convolution": ({"kernel_length": 0}, PAST, set()),
    "no branches": ({"branches": ()}, keys({CONVOLUTION: "past.1.taps past.2.taps"}, ""), set()),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_exports(name):
    module = importlib.import_module(name)
    listed = module.__all__ if name == "chela" else _reexported(module)
    assert sorted(listed) == EXPORTS[name].split()
    for public in listed:
        assert inspect.getdoc(getattr(module, public)) or public == "__version__"


def _reexported(module) -> list[str]:
    """Names written `import X as X`: what a package's __init__ offers."""
    return re.findall(r"import (\w+) as \1$", Path(module.__file__).read_text(encoding="utf-8"), re.MULTILINE)


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="module 'chela' has no attribute 'Chela'"):
        chela.Chela  # noqa: B018
    assert set(dir(chela)) == set(EXPORTS["chela"].split())


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_of_ops(name):
    signature = inspect.signature(getattr(importlib.import_module("chela.ops"), name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == f"({SIGNATURES[name]})"


def test_options_of_every_command():
    assert list(COMMANDS) == list(OPTIONS)
    for name, command in COMMANDS.items():
        assert list(options(command)) == OPTIONS[name].split(), name


def test_names_of_presets_and_tasks():
    assert " ".join(PRESETS) == (
        "digits listops-tiny lm-tiny listops text retrieval image pathfinder path-x speech"
        " lm-chela lm-transformer lm-gla lm-small"
    )
    assert " ".join(TASKS) == (
        "digits listops text retrieval image pathfinder path-x image-colour speech speech-35 spoken-digits citations"
        " bytes enwik8 text8 wikitext-2 wikitext-2-raw wikitext-103 wikitext-103-raw pg19 novels"
        " tokens"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_the_weights_of_every_kind(kind):
    assert set(chela.build(replace(SMALL, kind=kind)).state_dict()) == KINDS[kind]


@pytest.mark.parametrize("name", VARIANTS)
def test_keys_of_the_weights_with_other_settings(name):
    settings, gone, come = VARIANTS[name]
    assert gone <= KINDS["classifier"]
    assert set(chela.build(replace(SMALL, **settings)).state_dict()) == KINDS["classifier"] - gone | come


def test_importing_chela_is_quick_and_brings_no_compiler():
    script = """if True:
        import sys, time
        began = time.perf_counter()
        import chela
        cold = time.perf_counter() - began
        assert "torch" not in sys.modules, "nothing is imported before it is asked for"
        chela.build, chela.preset, chela.Classifier, chela.CausalLM
        import chela.ops, chela.layers, chela.models, chela.data, chela.training
        heavy = ("torch._dynamo", "torch._inductor", "triton", "transformers", "pyarrow", "matplotlib", "tyro")
        found = [name for name in sys.modules if name.startswith(heavy)]
        assert not found, found
        print(cold)"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3


def test_nothing_is_unpickled():
    """Weights, state and data are never code: no way in `src` to load any."""
    forbidden = re.compile(r"pickle|torch\.load\b|joblib|shelve|marshal|weights_only")
    for path in SOURCE.rglob("*.py"):
        found = forbidden.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found.group() if found else ''}"


def test_the_package_is_typed_and_has_a_version():
    assert (SOURCE / "py.typed").is_file()
    assert re.fullmatch(r"\d+\.\d+\.\d+", chela.__version__)
