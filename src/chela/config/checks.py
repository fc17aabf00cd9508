"""Checks that the parts of a run share."""

from dataclasses import fields
from numbers import Integral
from typing import Any, Literal, get_args, get_origin


def require(holds: bool, message: str) -> None:
    """Refuse a setting.

    Raises:
        ValueError: it does not hold.
    """
    if not holds:
        raise ValueError(message)


def check_fields(config: Any, part: str) -> None:
    """Refuse what a type checker would: no whole number, or none of the choices.

    Args:
        config: a dataclass, one part of a run.
        part: its name in messages.

    Raises:
        ValueError: names the field and its value.
    """
    for f in fields(config):
        value, choices = getattr(config, f.name), get_args(f.type)
        if get_origin(f.type) is Literal:
            require(value in choices, f"{part}.{f.name} must be one of {', '.join(choices)}; got {value!r}")
        require(f.type is not int or isinstance(value, Integral), f"{part}.{f.name} must be int, got {value!r}")
