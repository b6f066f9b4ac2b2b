"""What the sides of the peers have in common: a relay that is run until it delivered enough, and another clock."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable, Iterable
from time import perf_counter
from typing import Any

from benchmarks.sides._serve import Side
from benchmarks.sides._work import Clock, Tally

_READY = 0.3
"""Seconds that a relay gets for its connections, LISTEN among them, before the first message is written."""


def quiet() -> None:
    """Turns off what packages log at INFO and below, in all their variants: a terminal is not what is measured."""
    logging.disable(logging.INFO)


async def warm(side: Side) -> None:
    """Drains a few messages in each variant: what is imported or compiled at the first use is not measured."""
    for variant in side.settings:
        await side.fill(20, keys=0, size=300)
        await side.drain(seconds=5.0, messages=20, batch=10, variant=variant)


class Stopwatch(Clock):
    """A clock for those who do not commit with asyncpg."""

    def started(self, names: Iterable[Hashable]) -> None:
        """Says that the transaction which wrote these is committed next."""
        self._committing.update(dict.fromkeys(names, perf_counter()))


class Running:
    """A relay in a task of its own, and how to stop it in good order."""

    def __init__(self, relay: Coroutine[Any, Any, object], stop: Callable[[], object]) -> None:
        self._relay = relay
        self._stop = stop

    async def drain(self, tally: Tally, seconds: float) -> float:
        """Runs until the tally has enough or the time is over; returns messages/s, delivered by then."""
        count = 0

        async def reached() -> None:
            nonlocal count
            await tally.reached(seconds)
            count = tally.count

        await self._during(reached())
        return tally.rate(count)

    async def follow(self, clock: Clock, seconds: float, writing: Coroutine[Any, Any, None]) -> list[float]:
        """Runs while somebody writes, and then until all is delivered or for so long; returns the ms of each."""

        async def all_of_it() -> None:
            await asyncio.sleep(_READY)  # a relay of another package does not tell when it listens
            await writing
            await clock.reached(seconds)

        await self._during(all_of_it())
        return clock.ms

    async def _during(self, work: Coroutine[Any, Any, None]) -> None:
        relay, working = asyncio.ensure_future(self._relay), asyncio.ensure_future(work)
        await asyncio.wait([relay, working], return_when=asyncio.FIRST_COMPLETED)
        if relay.done():
            working.cancel()
            await relay
            raise RuntimeError("the relay ended by itself: its log says why")
        self._stop()
        await relay
        await working
