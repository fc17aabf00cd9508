"""Named starting points: functions that return a `RunConfig`, most derived from another by `replace`.

Each is an ordinary value: `chela.record.differences(listops(), text())` says in what two of them differ. What is
marked "after MEGA" comes from Table 8 of Ma et al. 2023 (z = d_key, v = d_value), "after S4", "after S5" and "after
LongConv" from the settings published with their code; pre-norm is kept throughout, because six post-norm layers with
this gate were seen to collapse on ListOps. Widths here are powers of two, to which the kernels would pad them.
"""

from collections.abc import Callable
from dataclasses import replace

from chela.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from chela.presets_language import lm_chela, lm_gla, lm_small, lm_tiny, lm_transformer
from chela.record import nearest


def digits() -> RunConfig:
    """Real handwritten digits read pixel by pixel: about two minutes on a CPU."""
    return RunConfig(
        preset="digits",
        model=ModelConfig(
            inputs="real", layers=3, d_model=64, d_ff=128, d_key=32, d_value=128, kernel_length=64, dropout=0.1
        ),
        data=DataConfig(task="digits"),
        optim=OptimConfig(lr=3e-3, weight_decay=0.02, warmup=100),
        train=TrainConfig(steps=1000, batch_size=32, eval_every=100, save_every=100, chance_after=300),
    )


def _trees() -> RunConfig:
    """What the presets of Long Range Arena start from, which was the first recipe for ListOps.

    A free tap for every lag learns the training trees by heart (docs/log.md); two parameters an octave cannot. Batch
    norm and mean pooling won a screening on shorter trees, this dropout and decay one of full length (docs/lra.md).
    """
    return RunConfig(
        preset="listops",
        model=ModelConfig(
            vocab=16,
            d_model=128,
            layers=6,
            kernel_length=2048,
            kernel="multiscale",
            taps_per_octave=2,
            norm="batch",
            pooling="mean",
            dropout=0.2,
        ),
        data=DataConfig(task="listops"),
        optim=OptimConfig(lr=3e-3, kernel_lr=1e-3, weight_decay=0.1, warmup=1500),
        train=TrainConfig(
            steps=15_000,
            batch_size=64,
            bucket_batches=50,
            pad_multiple=128,
            eval_every=1000,
            save_every=1000,
            log_every=50,
            chance_after=3000,
        ),
    )


def listops() -> RunConfig:
    """LRA ListOps, trees of 500 to 2000 symbols, generated on the spot (one GPU).

    SwiGLU learns trees faster than the MLP, and with a high rate by heart: a lower one and averaged weights make its
    lead last (docs/lra.md).
    """
    start = _trees()
    return replace(
        start,
        model=replace(start.model, feed_forward="bounded-swiglu"),
        optim=replace(start.optim, lr=2e-3),
        train=replace(start.train, steps=30_000, ema_decay=0.9995),
    )


def listops_tiny() -> RunConfig:
    """ListOps with trees of 16 to 128 symbols: minutes on a CPU, with the first recipe for `listops`."""
    start = _trees()
    return replace(
        start,
        preset="listops-tiny",
        model=replace(
            start.model, layers=3, d_model=64, d_ff=128, d_key=32, d_value=128, kernel_length=128, dropout=0.1
        ),
        data=replace(start.data, min_length=16, max_length=128, examples=50_000),
        optim=replace(start.optim, weight_decay=0.05, warmup=200),
        train=replace(
            start.train,
            steps=2000,
            batch_size=32,
            bucket_batches=0,
            pad_multiple=1,
            eval_every=200,
            save_every=200,
            log_every=10,
            chance_after=1000,
        ),
    )


def text() -> RunConfig:
    """LRA Text, film reviews as up to 4,000 bytes (one GPU).

    Depth and batch after MEGA, the layer as for ListOps. 22,500 reviews are learned by heart within a few epochs unless
    bytes are missing from them: word dropout is what generalises, and twice ListOps' rate (docs/lra.md).
    """
    start = _trees()
    return replace(
        start,
        preset="text",
        model=replace(start.model, vocab=257, classes=2, layers=4, kernel_length=4096, token_dropout=0.4),
        data=DataConfig(task="text"),
        optim=replace(start.optim, lr=6e-3, warmup=4000, schedule="cosine"),
        train=replace(start.train, steps=28_000, batch_size=50, ema_decay=0.999, eval_batch_size=100),
    )


def retrieval() -> RunConfig:
    """LRA Retrieval, do two papers cite each other, twice 4,000 bytes (one GPU, untuned start).

    Sizes and rate after MEGA, head on `[a, b, a - b, a * b]`; steps cut to fit half an hour.
    """
    start = _trees()
    return replace(
        start,
        preset="retrieval",
        model=replace(start.model, kind="two-tower", vocab=257, classes=2, kernel_length=4096, dropout=0.1),
        data=DataConfig(task="retrieval"),
        optim=replace(start.optim, weight_decay=0.04, warmup=2000),
    )


def _pixels() -> RunConfig:
    """What the presets that read pixels or samples start from, which was the first recipe for Image.

    The layer as for ListOps; decay, cosine and batch after S4 and LongConv. Two parameters an octave would blur which
    pixel is meant beyond lag 4; 32 blur it beyond lag 64, and the short branches see single pixels up to three rows
    (of 32 steps) away.
    """
    start = _trees()
    return RunConfig(
        preset="image",
        model=replace(
            start.model,
            inputs="real",
            vocab=256,
            kernel_length=1024,
            taps_per_octave=32,
            branches=(7, 35, 100),
            dropout=0.1,
        ),
        data=DataConfig(task="image"),
        optim=replace(start.optim, lr=4e-3, weight_decay=0.05, schedule="cosine", warmup=1000),
        train=TrainConfig(
            steps=120_000,
            batch_size=50,
            eval_every=4000,
            eval_batch_size=250,
            save_every=2000,
            log_every=50,
            chance_after=3000,
        ),
    )


def image() -> RunConfig:
    """LRA Image, gray CIFAR-10 read pixel by pixel, 1,024 steps (one GPU).

    Wide, without attention, which changes nothing here, and against learning by heart dropout, smoothed labels and
    averaged weights; 60 epochs where S4 and MEGA take 200 (docs/lra.md).
    """
    start = _pixels()
    return replace(
        start,
        model=replace(start.model, attention=False, d_model=256, d_ff=512, dropout=0.3),
        optim=replace(start.optim, warmup=5000),
        train=replace(start.train, steps=54_000, label_smoothing=0.1, ema_decay=0.999),
    )


def pathfinder() -> RunConfig:
    """LRA Pathfinder, are two dots joined by a path, 32 x 32 pixels (one GPU).

    Narrow, a quarter of Image's width, and without attention, which changes nothing here. What generalises is a high
    rate that is reached slowly: at 2e-3 the images are learned by heart, and a run that is at once at 4e-3 mostly stays
    at chance. So do 2 parameters an octave, which blur pixels a few rows away (docs/lra.md). Decay after LongConv.
    """
    start = _pixels()
    return replace(
        start,
        preset="pathfinder",
        model=replace(
            start.model,
            classes=2,
            d_model=64,
            d_ff=128,
            d_key=32,
            d_value=128,
            attention=False,
            taps_per_octave=16,
            dropout=0.05,
        ),
        data=DataConfig(task="pathfinder"),
        optim=replace(start.optim, lr=5e-3, weight_decay=0.03, warmup=20_000),
        train=replace(start.train, steps=150_000, batch_size=64, chance_after=30_000),
    )


def path_x() -> RunConfig:
    """LRA Path-X, the same question on 128 x 128 pixels, 16,384 steps (one GPU, untuned start).

    As for Pathfinder; depth and width after MEGA, rate and decay after S4, 8 epochs where they take 50. The last branch
    reaches one row (128 steps).
    """
    start = pathfinder()
    return replace(
        start,
        preset="path-x",
        model=replace(
            start.model,
            layers=4,
            kernel_length=16_384,
            branches=(7, 31, 132),
        ),
        data=DataConfig(task="path-x"),
        optim=replace(start.optim, lr=1e-3, weight_decay=0.05, warmup=2000),
        train=replace(
            start.train,
            steps=20_000,
            batch_size=64,
            eval_every=1000,
            eval_batch_size=64,
            eval_examples=2000,
            save_every=1000,
            chance_after=6000,
        ),
    )


def speech() -> RunConfig:
    """Ten spoken words as raw samples, 16,000 steps (one GPU, untuned start).

    Sizes near MEGA's for SC-Raw, batch after it, decay and schedule after S4. Waves want more parameters an octave than
    trees.
    """
    start = _pixels()
    return replace(
        start,
        preset="speech",
        model=replace(
            start.model,
            d_model=64,
            d_ff=128,
            d_key=32,
            d_value=128,
            kernel_length=16_000,
            taps_per_octave=16,
            branches=(7, 31),
        ),
        data=DataConfig(task="speech"),
        train=replace(start.train, steps=25_000, batch_size=20, eval_every=1000, eval_batch_size=20, save_every=1000),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "listops-tiny": listops_tiny,
    "lm-tiny": lm_tiny,
    "listops": listops,
    "text": text,
    "retrieval": retrieval,
    "image": image,
    "pathfinder": pathfinder,
    "path-x": path_x,
    "speech": speech,
    "lm-chela": lm_chela,
    "lm-transformer": lm_transformer,
    "lm-gla": lm_gla,
    "lm-small": lm_small,
}


def preset(name: str) -> RunConfig:
    """The settings of a named preset.

    Raises:
        ValueError: no preset has this name; the message has the nearest one and all of them.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{nearest(name, PRESETS)}; presets: {', '.join(PRESETS)}")
    return PRESETS[name]()
