"""Presets of language models; `presets` has the others and all their names."""

from dataclasses import replace

from chela.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig


def lm_tiny() -> RunConfig:
    """A language model on the bytes of any text: minutes on a CPU, then `chela generate`."""
    return RunConfig(
        preset="lm-tiny",
        model=ModelConfig(
            kind="causal-lm",
            vocab=256,
            causal=True,
            layers=4,
            d_model=128,
            d_ff=288,
            feed_forward="swiglu",
            d_key=64,
            d_value=128,
            kernel_length=256,
        ),
        data=DataConfig(task="bytes", max_length=512),
        optim=OptimConfig(lr=6e-3, warmup=100),
        train=TrainConfig(steps=600, batch_size=16, eval_every=100, eval_examples=128, save_every=100),
    )


def lm_chela() -> RunConfig:
    """A language model of 40M parameters on the bytes of English novels, context 8,192 (one GPU).

    `lm-transformer` and `lm-gla` differ from it in their blocks alone: data, tokens a step, rate, schedule and number
    of parameters (to 3 %) are the same, so that equal minutes compare the models. Widths and rate come from a search on
    a CPU; of two rates, the others were better with this one too (docs/lm.md).
    """
    return RunConfig(
        preset="lm-chela",
        model=ModelConfig(
            kind="causal-lm",
            vocab=256,
            causal=True,
            layers=12,
            d_model=512,
            d_ff=1216,
            feed_forward="swiglu",
            d_key=64,
            d_value=512,
            heads=8,
            decay=True,
            kernel="multiscale",
            kernel_length=8192,
            norm="rms",
            dropout=0.1,
        ),
        data=DataConfig(task="novels", max_length=8192),
        optim=OptimConfig(lr=3e-3, weight_decay=0.1, warmup=500, schedule="cosine"),
        train=TrainConfig(
            steps=10_000,
            batch_size=8,
            eval_every=500,
            eval_examples=64,
            save_every=500,
            log_every=50,
            chance_after=1000,
        ),
    )


def lm_transformer() -> RunConfig:
    """A Transformer to measure `lm-chela` against: rotary, softmax attention, SwiGLU (one GPU)."""
    start = lm_chela()
    return replace(
        start,
        preset="lm-transformer",
        model=ModelConfig(
            kind="causal-lm",
            vocab=256,
            causal=True,
            mixer="transformer",
            layers=12,
            d_model=512,
            d_ff=1472,
            feed_forward="swiglu",
            heads=8,
            norm="rms",
            dropout=0.1,
        ),
    )


def lm_gla() -> RunConfig:
    """Gated linear attention of flash-linear-attention, beside `lm-chela` (one GPU)."""
    start = lm_transformer()
    return replace(start, preset="lm-gla", model=replace(start.model, mixer="gla", heads=4))


def lm_small() -> RunConfig:
    """A small language model on the bytes of English novels, at most 8 MB in float32 (one GPU)."""
    start = lm_chela()
    return replace(
        start,
        preset="lm-small",
        model=replace(
            start.model,
            layers=8,
            d_model=128,
            d_ff=304,
            d_value=128,
            heads=4,
            kernel_length=4096,
            dropout=0.0,
        ),
        data=replace(start.data, max_length=4096),
        optim=replace(start.optim, lr=6e-3),
        train=replace(start.train, batch_size=16, eval_examples=128),
    )
