"""When something that may have to walk over dead rows is done again."""

from time import monotonic
from typing import Final

START_INTERVAL: Final = 60.0
"""Seconds after which all bounds are forgotten, and claims of nobody looked for: both should never matter."""

_SHARE: Final = 20
"""A search over rows that may be dead takes at most about one part in this many of the time."""


def after(started: float, interval: float) -> float:
    """Returns the time for the next one, of what began then and has just ended: later if it took long."""
    now = monotonic()
    return now + max(interval, _SHARE * (now - started))
