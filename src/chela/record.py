"""The record of a run: configs to TOML and back, and what differs between two of them."""

import difflib
import tomllib
import typing
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w

from chela.config import RunConfig

Config = TypeVar("Config")


def nearest(word: str, words: Iterable[str]) -> str:
    """' (did you mean …?)' for the closest of `words`, or an empty string."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values that TOML and JSON can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(asdict(config))


def from_dict(kind: type[Config], values: dict[str, Any], prefix: str = "") -> Config:
    """Build a config from plain values; every key must be known and every value of the declared type.

    Raises:
        ValueError: an unknown key (names the nearest), a value of the wrong type or outside its range.
    """
    hints = typing.get_type_hints(kind)
    names = [f.name for f in fields(kind)]  # pyrefly: ignore
    for key in values:
        if key not in names:
            raise ValueError(f"unknown key {prefix}{key}{nearest(key, names)}")
    return kind(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in values.items()})


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _convert(hint: Any, value: Any, name: str) -> Any:
    origin = typing.get_origin(hint)
    if is_dataclass(hint):
        _check(isinstance(value, dict), f"{name} must be a table, got {value!r}")
        return from_dict(typing.cast(type, hint), value, f"{name}.")
    if origin is Literal:
        choices = typing.get_args(hint)
        _check(value in choices, f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")
        return value
    if origin is tuple:
        args = typing.get_args(hint)
        _check(isinstance(value, list | tuple), f"{name} must be a list, got {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        _check(len(kinds) == len(value), f"{name} must have {len(kinds)} entries, got {value!r}")
        return tuple(_convert(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if hint is Path:
        _check(isinstance(value, str | Path), f"{name} must be a path, got {value!r}")
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    assert isinstance(hint, type), f"config fields have one plain type each, {name} has {hint}"
    _check(type(value) is hint, f"{name} must be {hint.__name__}, got {value!r}")
    return value


def save_toml(config: RunConfig, path: Path) -> None:
    """Write a run's settings as TOML."""
    path.write_text(tomli_w.dumps(to_dict(config)), encoding="utf-8")


def load_toml(path: Path) -> RunConfig:
    """Read a run's settings.

    Raises:
        ValueError: missing or malformed file, unknown key, bad value; the message names the file.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        _check(bool(values), "the file is empty: the settings of the run are lost")
        return from_dict(RunConfig, values)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} does not exist: is {path.parent} the folder of a run?") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Every key in which two configs differ, as 'key was A, now B'."""
    lines = []
    before, after = to_dict(old), to_dict(new)
    for key in before:
        if isinstance(before[key], dict):
            lines += differences(getattr(old, key), getattr(new, key), f"{prefix}{key}.")
        elif before[key] != after[key]:
            lines.append(f"{prefix}{key} was {before[key]!r}, now {after[key]!r}")
    return lines
