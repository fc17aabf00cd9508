"""Durations as people write them."""


def seconds(duration: str) -> float | None:
    """Turn `90s`, `9m` or `1h30m` into seconds; an empty string into None.

    Raises:
        ValueError: the text is not a duration.
    """
    if not duration:
        return None
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    total, number = 0.0, ""
    for character in duration:
        if character.isdigit() or character == ".":
            number += character
        elif character in units and number.count(".") < 2 and number.strip("."):
            total, number = total + float(number) * units[character], ""
        else:
            raise ValueError(f"a duration looks like 90s, 9m or 1h30m; got {duration!r}")
    if number or total <= 0:
        raise ValueError(f"a duration looks like 90s, 9m or 1h30m; got {duration!r}")
    return total
