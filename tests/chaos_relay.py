"""A relay in a process of its own, with a destination of many moods that writes down what it takes.

python -m tests.chaos_relay SETTINGS, one object of JSON; `Setup` says what is in it.
"""

import asyncio
import json
import os
import random
import signal
import sys
import zlib
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any, Final, Literal
from uuid import UUID

import anyio
import anyio.lowlevel
import asyncpg

from outbox import (
    CommitStrategy,
    DestinationUnavailableError,
    ExponentialBackOff,
    Message,
    Outbox,
    PartialDispatchError,
    RejectedError,
    Relay,
    RelayFenced,
    half_jitter,
)
from tests.history.journal import Journal

REJECTED: Final = "rejected"
"""The topic of the messages that the destination rejects for ever."""

LEASE: Final = 2.0
GRACE: Final = 4.0
TIMEOUT: Final = 1.0
BATCH: Final = 20
POOL: Final = 3

# Again and again, whatever happens: so the dead letters are exactly those that were rejected.
_BACKOFF: Final = ExponentialBackOff(
    initial=timedelta(milliseconds=30), maximum=timedelta(seconds=1), max_tries=-1, jitter=half_jitter
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a relay process is started with."""

    dsn: str
    journal: str
    name: str
    seed: str
    commit: str
    order: Literal["none"] = "none"

    def dumps(self) -> str:
        return json.dumps(asdict(self))


class MoodyDestination:
    """Takes what it is given, mostly; else it raises, hangs, takes a half, rejects, or is not there.

    What it takes is written down when it takes it, and its answer when it gives it: between the two it may hang or
    raise. Of a key it takes all or none in one call, as a destination does that keeps an order.
    """

    def __init__(self, journal: Journal, dice: random.Random) -> None:
        self._journal = journal
        self._dice = dice
        self._calls = 0
        self._down_until = 0.0

    async def dispatch(self, *messages: Message) -> None:
        self._calls += 1
        call, begun, mood = self._calls, monotonic(), self._dice.random()
        await asyncio.sleep(self._dice.choice([0, 0, 0.002, 0.01, 0.05]))
        self._be_down(mood)
        if mood < 0.02:
            raise RuntimeError("not now")
        if mood < 0.022:
            await asyncio.sleep(10 * TIMEOUT)
        refused = self._refused(messages, partly=mood < 0.08)
        if mood > 0.99 and any(message.topic == REJECTED for message in messages):
            raise RejectedError("one of these")
        if taken := [message for message in messages if message.id not in refused]:
            self._take(call, begun, taken)
        if 0.022 <= mood < 0.024:
            await asyncio.sleep(10 * TIMEOUT)
        if 0.024 <= mood < 0.028:
            raise ConnectionResetError("it took them, and the answer was lost")
        self._journal.note("answered", relay=os.getpid(), call=call)
        if refused:
            raise PartialDispatchError(refused)

    def _be_down(self, mood: float) -> None:
        if mood > 0.995:
            self._down_until = monotonic() + self._dice.uniform(0.1, 1.0)
        if monotonic() < self._down_until:
            raise DestinationUnavailableError("nobody is there")

    def _refused(self, messages: tuple[Message, ...], *, partly: bool) -> dict[UUID, BaseException]:
        refused: dict[UUID, BaseException] = {
            message.id: RejectedError("never") for message in messages if message.topic == REJECTED
        }
        if partly:
            others = {message.key or str(message.id) for message in messages if self._dice.random() < 0.5}
            for message in messages:
                if (message.key or str(message.id)) in others:
                    refused.setdefault(message.id, RuntimeError("not this one, not now"))
        return refused

    def _take(self, call: int, begun: float, messages: list[Message]) -> None:
        rows = [[str(message.id), message.position, zlib.crc32(message.body)] for message in messages]
        self._journal.note("took", relay=os.getpid(), call=call, begun=begun, messages=rows)


async def _main(setup: Setup) -> None:
    journal = Journal(Path(setup.journal))
    # Not closed but terminated: closing would wait for a server that may not answer.
    pool = await asyncpg.create_pool(
        setup.dsn, min_size=0, max_size=POOL, server_settings={"application_name": setup.name}
    )

    def hook(event: Any) -> None:
        if isinstance(event, RelayFenced):
            journal.note_span("fence", os.getpid(), monotonic())

    relay = Relay(
        Outbox(),
        pool,
        MoodyDestination(journal, random.Random(setup.seed)),
        batch_size=BATCH,
        commit=CommitStrategy(setup.commit),
        order=setup.order,
        backoff=_BACKOFF,
        hooks=[hook],
        destination_backoff=_BACKOFF,
        dispatch_timeout=timedelta(seconds=TIMEOUT),
        lease=timedelta(seconds=LEASE),
        grace=timedelta(seconds=GRACE),
    )
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    loop.add_signal_handler(signal.SIGTERM, lambda: tasks.add(asyncio.create_task(relay.stop())))
    loop.add_signal_handler(signal.SIGUSR1, lambda: tasks.add(asyncio.create_task(_hog(pool))))
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(relay.run)
            await anyio.lowlevel.checkpoint()  # it can be stopped from its first step on
            print("running", flush=True)
    finally:
        for task in tasks:
            task.cancel()
        pool.terminate()


async def _hog(pool: "asyncpg.Pool[Any]") -> None:
    """Takes each connection of the pool that comes free, for as long as a relay waits with patience."""
    try:
        async with asyncio.timeout(LEASE), asyncio.TaskGroup() as group:
            for _ in range(2 * POOL):
                group.create_task(_keep_one(pool))
    except (TimeoutError, BaseExceptionGroup):
        pass


async def _keep_one(pool: "asyncpg.Pool[Any]") -> None:
    async with pool.acquire():
        await asyncio.sleep(LEASE)


if __name__ == "__main__":
    asyncio.run(_main(Setup(**json.loads(sys.argv[1]))))
