"""The tokens of chela's models for the tokenizers of transformers: bytes, or the tokenizer.json of a run."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TOKENIZER = "tokenizer.json"
"""File of a run whose tokens are no bytes."""
END = "<|endoftext|>"
"""Its token behind every document."""

_SETTINGS: dict[str, Any] = {
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def run_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a run: that of its tokenizer.json, or bytes; pads on the left.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / TOKENIZER
    if not path.is_file():
        return byte_tokenizer()
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is damaged, or no file of the library tokenizers ({error})") from None
    end = END if tokenizer.token_to_id(END) is not None else None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end, **_SETTINGS)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Text to the bytes of its UTF-8 form and back, as chela's byte-level models read it; pads on the left with 0."""
    letters = _letters_of_bytes()
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=letters[0], **_SETTINGS)


def _letters_of_bytes() -> list[str]:
    """The letter that the byte-level alphabet of tokenizers has for each byte 0..255 (GPT-2's).

    Printable bytes stand for themselves, the others for the letters from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
