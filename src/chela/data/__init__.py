"""Tasks: what is read from disk or generated, and batches of it as pure functions of (seed, step)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from chela.config import DataConfig, Encoding
from chela.data import (
    corpora,
    digits,
    images,
    language,
    listops,
    novels,
    own_tokens,
    pathfinder,
    retrieval,
    speech,
    spoken_digits,
    text,
)
from chela.data.batch import Batch as Batch
from chela.data.batch import FixedSplit as FixedSplit
from chela.data.batch import FixedTokens as FixedTokens
from chela.data.batch import Split as Split
from chela.data.batch import StreamSplit as StreamSplit
from chela.data.batch import TextMeasure as TextMeasure
from chela.data.order import consecutive_at as consecutive_at
from chela.data.order import indices_at as indices_at
from chela.data.packed import PackedSplit as PackedSplit
from chela.data.ragged import PairSplit as PairSplit
from chela.data.ragged import RaggedReal as RaggedReal
from chela.data.ragged import RaggedSplit as RaggedSplit
from chela.data.task import Task as Task
from chela.record import nearest

Progress = Callable[[str], None] | None


@dataclass(frozen=True)
class Reader:
    """What reads or generates a task, and the settings it understands."""

    load: Callable[[DataConfig, Progress], Task]
    """Called with the settings, encoding and rate filled in."""
    about: str
    """The task in a line."""
    encodings: tuple[Encoding, ...] = ("",)
    """Values of `data.encoding`, the usual one first."""
    rates: tuple[int, ...] = (0,)
    """Values of `data.rate`, the usual one first."""
    cuts: bool = False
    """Whether `data.max_length` cuts sequences; where it does not, all have the same length."""
    packs: bool = False
    """Whether `data.packed` packs documents."""


def _corpus(open_corpus: Callable[[Path], corpora.Corpus], about: str) -> Reader:
    return Reader(
        lambda config, progress: language.load(config, progress, open_corpus),
        about,
        encodings=("bytes", "bpe"),
        cuts=True,
        packs=True,
    )


TEXTS: tuple[Encoding, ...] = ("bytes", "characters")
PIXELS: tuple[Encoding, ...] = ("real", "tokens")
READERS = {
    "digits": Reader(
        lambda config, _: digits.load(config), "1,797 handwritten digits, read pixel by pixel (comes with chela)"
    ),
    "listops": Reader(
        listops.load, "nested list operations, 501 to 1999 symbols (generated, or the published files)", cuts=True
    ),
    "text": Reader(text.load, "IMDB reviews as bytes or characters (your copy)", encodings=TEXTS, cuts=True),
    "retrieval": Reader(
        retrieval.load, "do two papers of AAN cite each other, from both texts (your copy)", encodings=TEXTS, cuts=True
    ),
    "image": Reader(
        lambda config, _: images.load(config), "CIFAR-10 in gray, read pixel by pixel (your copy)", encodings=PIXELS
    ),
    "pathfinder": Reader(
        pathfinder.load, "are two discs joined, 32 x 32 pixels (generated, or the published files)", encodings=PIXELS
    ),
    "path-x": Reader(
        pathfinder.load, "are two discs joined, 128 x 128 pixels (generated, or the published files)", encodings=PIXELS
    ),
    "image-colour": Reader(
        lambda config, _: images.load_colour(config), "CIFAR-10 in colour, read pixel by pixel (your copy)"
    ),
    "speech": Reader(speech.load, "ten spoken words as raw samples (your copy)", rates=(16_000, 8000)),
    "speech-35": Reader(speech.load_all, "35 spoken words as raw samples (your copy)", rates=(16_000, 8000)),
    "spoken-digits": Reader(
        lambda config, _: spoken_digits.load(config),
        "ten spoken digits as raw samples (your copy)",
        rates=(8000,),
        cuts=True,
    ),
    "citations": Reader(
        retrieval.load_citations,
        "does a paper cite another, from both texts (your own set)",
        encodings=TEXTS,
        cuts=True,
    ),
    "bytes": _corpus(corpora.own_texts, "language modelling on any text (your files)"),
    "enwik8": _corpus(
        partial(corpora.hundred_million, "enwik8"), "language modelling on 100 MB of Wikipedia's XML (your copy)"
    ),
    "text8": _corpus(
        partial(corpora.hundred_million, "text8"), "language modelling on 100 MB of Wikipedia in 27 letters (your copy)"
    ),
    **{
        f"wikitext-{size}{end}": _corpus(
            partial(corpora.wikitext, f"wikitext-{size}{end}"),
            f"language modelling on {size} million words of Wikipedia, {how} (your copy)",
        )
        for size in (2, 103)
        for end, how in (("", "rare words replaced"), ("-raw", "as written"))
    },
    "pg19": _corpus(corpora.pg19, "language modelling on 28,752 books before 1919 (your copy)"),
    "novels": _corpus(novels.novels, "language modelling on 86 English novels, a corpus of its own (your copy)"),
    "tokens": Reader(
        own_tokens.load, "language modelling on tokens of any kind (your token files)", cuts=True, packs=True
    ),
}
TASKS = {name: reader.about for name, reader in READERS.items()}
"""What each task is, in a line."""


def load_task(config: DataConfig, *, progress: Progress = None) -> Task:
    """Read or generate the task `config.task`.

    Args:
        config: task, data root, encoding and limits.
        progress: told what takes long.

    Raises:
        ValueError: unknown task, a setting it does not take, or data that are missing or malformed; says what to do.
    """
    name = config.task
    if name not in READERS:
        raise ValueError(f"unknown task {name!r}{nearest(name, READERS)}; tasks: {', '.join(READERS)}")
    reader = READERS[name]
    if config.encoding and config.encoding not in reader.encodings:
        raise ValueError(f"--data.encoding is {config.encoding}: {name} {_takes(reader.encodings)}")
    if config.rate and config.rate not in reader.rates:
        raise ValueError(f"--data.rate is {config.rate}: {name} {_takes(reader.rates)}")
    if config.max_length and not reader.cuts:
        raise ValueError(f"--data.max-length is {config.max_length}: all sequences of {name} have the same length")
    if config.vocab and config.encoding != "bpe":
        raise ValueError(f"--data.vocab is {config.vocab}: the size of a tokenizer, set --data.encoding bpe with it")
    if config.packed and not reader.packs:
        raise ValueError(f"--data.packed packs the documents of a language model's text: {name} has none")
    if config.distractors and name not in pathfinder.RULES:
        raise ValueError(f"--data.distractors is {config.distractors}: only {' and '.join(pathfinder.RULES)} have them")
    filled = replace(config, encoding=config.encoding or reader.encodings[0], rate=config.rate or reader.rates[0])
    return reader.load(filled, progress)


def _takes(choices: tuple[object, ...]) -> str:
    """What a task takes, in words."""
    return f"takes {' or '.join(map(str, choices))}" if any(choices) else "has one form alone, leave the option out"
