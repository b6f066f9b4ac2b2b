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
from collections.abc import Mapping
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
    WriterLate,
    half_jitter,
)
from tests.history.journal import Journal

REJECTED: Final = "rejected"
"""The topic of the messages that the destination rejects for ever."""
MENDABLE: Final = "mendable"
"""The topic of those that it rejects until an operator mends them, which is a file of their id."""

LEASE: Final = 2.0
GRACE: Final = 4.0
TIMEOUT: Final = 1.0
BATCH: Final = 20
CONCURRENCY: Final = 4
POOL: Final = 3
PATIENCE: Final = 30.0
"""How long an order waits for a writer: longer than any of them takes."""

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
    order: Literal["none", "key", "total"]
    on_failure: Literal["block", "park", "skip"]

    @property
    def mended(self) -> Path:
        return mended(Path(self.journal))

    def dumps(self) -> str:
        return json.dumps(asdict(self))


def mended(journal: Path) -> Path:
    """Returns the folder of a run in which the messages that were mended have a file."""
    return journal.with_suffix(".mended")


class MoodyDestination:
    """Takes what it is given, mostly; else it raises, hangs, takes a half, rejects, or is not there.

    What it takes is written down when it takes it, and its answer when it gives it: between the two it may hang or
    raise. What it refuses is written down before anybody hears of it. Of a key (in total order: of everything) it
    takes all, or those before the first that it refuses, as a destination does that keeps an order.
    """

    def __init__(self, journal: Journal, dice: random.Random, setup: Setup) -> None:
        self._journal = journal
        self._dice = dice
        self._mended = setup.mended
        self._is_total = setup.order == "total"
        self._calls = 0
        self._down_until = 0.0

    async def dispatch(self, *messages: Message) -> None:
        try:
            await self._dispatch(messages)
        except PartialDispatchError as error:
            self._refuse(error.failures)
            raise
        except DestinationUnavailableError:  # no refusal: it did not look at them
            raise
        except BaseException as error:  # also when it is given up
            self._refuse({message.id: error for message in messages}, alone=len(messages) == 1)
            raise

    def _refuse(self, failures: Mapping[UUID, BaseException], *, alone: bool = True) -> None:
        rejected = [str(name) for name, error in failures.items() if alone and isinstance(error, RejectedError)]
        if rejected:
            self._journal.note("rejected", relay=os.getpid(), messages=rejected)
        self._journal.note("refused", relay=os.getpid(), messages=[str(name) for name in failures])

    async def _dispatch(self, messages: tuple[Message, ...]) -> None:
        self._calls += 1
        call, begun, mood = self._calls, monotonic(), self._dice.random()
        await asyncio.sleep(self._dice.choice([0, 0, 0.002, 0.01, 0.05]))
        self._be_down(mood)
        if mood < 0.02:
            raise RuntimeError("not now")
        if mood < 0.022:
            await asyncio.sleep(10 * TIMEOUT)
        refused = self._refused(messages, partly=mood < 0.08)
        if mood > 0.97 and any(self._rejects(message) for message in messages):
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

    def _rejects(self, message: Message) -> bool:
        return message.topic == REJECTED or (
            message.topic == MENDABLE and not (self._mended / str(message.id)).exists()
        )

    def _refused(self, messages: tuple[Message, ...], *, partly: bool) -> dict[UUID, BaseException]:
        refused: dict[UUID, BaseException] = {}
        stopped = set[str]()
        for message in messages:
            lane = "all" if self._is_total else message.key or str(message.id)
            # It may look at what comes behind one that it refused, or not.
            if self._rejects(message) and (lane not in stopped or self._dice.random() < 0.5):
                refused[message.id] = RejectedError("never")
            elif lane in stopped or (partly and self._dice.random() < 0.3):
                refused[message.id] = RuntimeError("not this one, not now")
            else:
                continue
            stopped.add(lane)
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
        elif isinstance(event, WriterLate) and event.passed_over:
            journal.note("passed_over", relay=os.getpid(), pid=event.pid)

    relay = Relay(
        Outbox(),
        pool,
        MoodyDestination(journal, random.Random(setup.seed), setup),
        batch_size=BATCH,
        concurrency=CONCURRENCY,
        commit=CommitStrategy(setup.commit),
        order=setup.order,
        on_failure=setup.on_failure,
        late_commit_wait=timedelta(seconds=PATIENCE),
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
