"""Token files of the user's own, such as a corpus that another tokenizer has cut, as a language model's task."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from chela.config import DataConfig
from chela.data.batch import TextMeasure
from chela.data.corpora import PARTS
from chela.data.find import find_folder
from chela.data.language import MAX_LENGTH, make_split
from chela.data.task import Task
from chela.data.token_files import HEADER, TokenFiles
from chela.data.tokenizer import FILE, Tokenizer

WANTED = (
    f"the folders train, valid and test of token files ({HEADER}, written by chela.data.token_files.TokenWriter) and, "
    f"for bits per byte and text, the {FILE} that made them"
)


def load(config: DataConfig, _: Callable[[str], None] | None) -> Task:
    """Windows, or rows of whole documents, of token files; the vocabulary is theirs.

    Raises:
        ValueError: files missing or damaged, or vocabularies that differ.
    """

    def complete(folder: Path) -> bool:
        return all((folder / part / HEADER).is_file() for part in PARTS)

    folder = find_folder(config.root, ("tokens",), complete, "tokens", WANTED)
    parts = {part: TokenFiles(folder / part) for part in PARTS}
    path = folder / FILE
    tokenizer = path.read_text(encoding="utf-8") if path.is_file() else ""
    coder = Tokenizer(tokenizer) if tokenizer else None
    vocab = parts["train"].vocab
    named = {str(folder / part): tokens.vocab for part, tokens in parts.items()}
    named |= {str(path): coder.vocab} if coder else {}
    for other, count in named.items():
        if count != vocab:
            raise ValueError(f"{other} has a vocabulary of {count}, but {folder / 'train'} one of {vocab}")
    splits = []
    for part, tokens in parts.items():
        if len(tokens) < 2:
            raise ValueError(f"{folder / part} has {len(tokens)} tokens: at least 2 are needed")
        text = None
        if coder:
            token_bytes = np.array([len(piece) for piece in coder.pieces], dtype=np.int64)
            text = TextMeasure(token_bytes, tokens.bytes, tokens.words, len(tokens.ends), len(tokens))
        splits.append(make_split(tokens, config, text))
    train, val, test = splits
    return Task(
        name="tokens",
        kind="causal-lm",
        train=train,
        val=val,
        test=test,
        inputs="tokens",
        vocab=vocab,
        max_length=config.max_length or MAX_LENGTH,
        decode=coder.decode if coder else None,
        chance_loss=math.log(vocab),
        note=f"the token files in {folder.name}",
        tokenizer=tokenizer,
    )
