"""The kinds of values that options take."""

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Final

from cyclopts import Parameter, Token
from cyclopts.validators import Number

_UNITS: Final = {"w": 604_800.0, "d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION: Final = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhdw]))+", re.ASCII)
_PART: Final = re.compile(r"([\d.]+)(ms|[smhdw])")


def _duration(_type: object, tokens: Sequence[Token]) -> timedelta:
    text = tokens[0].value
    if not _DURATION.fullmatch(text):
        raise ValueError("a length of time is 500ms, 30s, 1h30m or 7d")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    try:
        duration = timedelta(seconds=seconds)
    except OverflowError:
        raise ValueError("it is too long") from None
    if not duration:
        raise ValueError("it must be longer than zero")
    return duration


def shown(value: object) -> str | None:
    """Says a default in the words of the command line; what is off or nothing needs none."""
    if value is None or value is False:
        return None
    if not isinstance(value, timedelta):
        return str(value)
    seconds = value.total_seconds()
    return next((f"{seconds / size:g}{unit}" for unit, size in _UNITS.items() if seconds >= size), f"{seconds:g}s")


Duration = Annotated[timedelta, Parameter(converter=_duration, metavar="DURATION")]
"""A length of time: 30s, 1h30m, 7d."""

Count = Annotated[int, Parameter(validator=Number(gte=1), metavar="N")]
"""At least one."""
