"""What a side can do, and the loop in which it is asked for it: one JSON object a line, in and out.

    {"do": "drain", "seconds": 1.2, …}  →  {"ok": 81234.5, "count": 97482}  or  {"error": "TypeError: …"}

`{"do": "hello"}` asks who it is. Each call runs in an event loop of its own, so nothing stays open from one to the
next: a side connects, works and disconnects, and only the work counts. Whatever a package prints goes to stderr.

It and the sides import the standard library, asyncpg and the side's own package alone, since each side runs in an
environment of its own: `python -m benchmarks.sides.by_hand DSN`, with the root of the repository as the folder.
"""

import asyncio
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol


class Side(Protocol):
    """Whoever does the work, in a database of its own; made of the DSN.

    What it cannot do raises `NotImplementedError` with the reason.
    """

    name: str
    version: str
    settings: Mapping[str, str]
    """What each variant sets, by its name: "default", "fast" (what its documentation recommends), and others."""
    uvloop: Collection[str]
    """The variants that run on uvloop; it is in the environment of that side then."""
    count: int
    """How many messages the last `write` committed, and the last `drain` or `latency` delivered: different ones."""

    async def prepare(self) -> None:
        """Creates its tables in an empty database, and `orders (id bigint GENERATED ALWAYS AS IDENTITY)`."""

    async def fill(self, messages: int, *, keys: int, size: int) -> None:
        """Makes the backlog exactly so many messages, none included, in place of what was there.

        By SQL on the server, in exactly the form in which the package itself would have written them; with the
        statistics that autovacuum would leave.

        Args:
            messages: How many are pending then.
            keys: How many different keys they have, in turn; 0 is no key.
            size: The bytes of a body.
        """

    async def write(self, *, seconds: float, per_transaction: int, connections: int, size: int, variant: str) -> float:
        """Writes for so long, and returns messages/s: transactions of one row in `orders` and so many messages."""
        ...

    async def drain(
        self, *, seconds: float, messages: int, batch: int, variant: str, pause: float = 0.0, order: bool = False
    ) -> float:
        """Drains, and returns messages/s.

        From the first delivery until so many messages were delivered, or the time is over, whichever is first; then
        the relay is stopped in good order. Other processes may drain the same tables at the same time.

        Args:
            seconds: After so many it stops, with what it delivered until then.
            messages: As soon as so many are delivered, it stops.
            batch: How many it takes at once, or the nearest that the package has.
            variant: Of its settings.
            pause: How long the destination sleeps, by asyncio, for each call; then it accepts all that it got.
            order: With the order of keys that the package has, if it has one.
        """
        ...

    async def latency(self, *, per_second: int, seconds: float, variant: str, per_transaction: int = 1) -> list[float]:
        """Returns for each message the ms from just before its COMMIT to the destination, from an empty backlog.

        Relay and writers are in this process. The writers keep to their timetable as well as they can, and then it
        waits for the rest for as long again, or five seconds: what is not delivered by then is not among the figures.

        Args:
            per_second: Messages, evenly spread over time in transactions.
            seconds: How long they are written.
            variant: Of its settings.
            per_transaction: Messages in each transaction; the rate stays the same.
        """
        ...

    async def rows(self) -> dict[str, int]:
        """Returns how many messages are "pending" and how many "settled" ones are kept."""
        ...


def serve(make: Callable[[str], Side]) -> None:
    """Answers what is asked on stdin until it ends; the DSN is the first argument of the process."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    side = make(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(_answer(side, json.loads(line))), file=answers, flush=True)


def _answer(side: Side, asked: dict[str, Any]) -> dict[str, Any]:
    verb = asked.pop("do")
    if verb == "hello":
        loops = {variant: "uvloop" if variant in side.uvloop else "asyncio" for variant in side.settings}
        return {"ok": {"name": side.name, "version": side.version, "settings": dict(side.settings), "loops": loops}}
    try:
        with asyncio.Runner(loop_factory=_loop(side, asked.get("variant"))) as runner:
            answer = runner.run(getattr(side, verb)(**asked))
    except Exception as error:  # noqa: BLE001 -- whatever goes wrong is the answer, and the next question comes
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {"ok": answer, "count": side.count}


def _loop(side: Side, variant: str | None) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if variant is not None and variant not in side.settings:
        raise ValueError(f"{side.name} has no variant {variant!r}")
    if variant not in side.uvloop:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
    return factory
