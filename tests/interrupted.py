"""A relay interrupted at the n-th await of its cycle, wherever that is: the awaits are counted as they happen.

In the tests' own process the interruption is a cancellation. Run as a program, this forks a process for each line
of its input, has a relay run in it, and the process kills itself at the n-th await:

python -m tests.interrupted    reads lines of JSON, see `_Order`; answers each with "killed" or "completed"

The program has no thread, no loop and no connection when it forks: each process opens its own.
"""

import asyncio
import inspect
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import UUID

import anyio
import asyncpg

from outbox import CommitStrategy, DestinationUnavailableError, Message, NoWaiting, Outbox, PartialDispatchError, Relay
from outbox import RejectedError as Rejected

LEASE = timedelta(seconds=1)
BATCH = 3
MESSAGES = 5
"""Of fresh messages, so that there is more than one batch."""
KEYS = ("a", "b", "a", None, "a", "b", "a")
"""Of the messages where an order is kept: one key has more of them than a batch holds."""


# --- counting awaits ------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A place in the library where a task is suspended: the lines of the functions that wait for each other."""

    lines: str
    time: int = 1
    """The how manieth time that one is there."""


class Awaits:
    """Counts each suspension of each task made inside `counted`, and interrupts at one of them.

    Args:
        at: The number of the suspension, from 1; or a point in the library.
        interrupt: Called with this, and with what the task is about to wait for: None is a mere turn of the loop.

    Attributes:
        count: How many there were.
        points: How many there were at each place, if it is asked for a point.
        task: The one that was begun first, and made the others.
        scope: What it runs in.
    """

    def __init__(self, at: int | Point, interrupt: "Interruption") -> None:
        self.count = 0
        self.points: Counter[str] = Counter()
        self.reached = False
        """Whether there were so many."""
        self.task: asyncio.Task[Any]
        self.scope = anyio.CancelScope()
        self._at = at
        self._interrupt = interrupt

    def begin(self, work: Coroutine[Any, Any, object]) -> "asyncio.Task[Any]":
        """Begins the work that is interrupted."""

        async def scoped() -> None:
            with self.scope:
                await work

        self.task = asyncio.create_task(scoped())
        return self.task

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Has every task that is made from here on counted, and every task that those make."""
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()

        def make(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
            return asyncio.Task(_Counted(coro, self), loop=loop, **options)

        loop.set_task_factory(make)
        try:
            yield
        finally:
            loop.set_task_factory(before)

    def suspended(self, coroutine: Coroutine[Any, Any, Any], waited: Any) -> None:
        """Counts one, and interrupts if it is the one."""
        self.count += 1
        here: int | Point = self.count
        if isinstance(self._at, Point):
            lines = _lines(coroutine)
            self.points[lines] += 1
            here = Point(lines, self.points[lines])
        if here == self._at:
            self.reached = True
            self._interrupt(self, waited)


_LIBRARY = str(Path(inspect.getfile(Relay)).parent)


def _lines(waiting: Any) -> str:
    """Says where in the library a coroutine is suspended, and where those that it waits for are."""
    lines = []
    while waiting is not None:
        kind = next((kind for kind in ("cr", "ag", "gi") if hasattr(waiting, f"{kind}_frame")), None)
        frame = getattr(waiting, f"{kind}_frame") if kind else None
        if frame is None:
            break
        if frame.f_code.co_filename.startswith(_LIBRARY):
            lines.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}:{frame.f_lineno}")
        # What an async context manager waits for is hidden, but for the generator that it is made of.
        hidden = getattr(frame.f_locals.get("self"), "gen", None) if "contextlib" in frame.f_code.co_filename else None
        waiting = hidden or getattr(waiting, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")
    return " > ".join(lines)


class _Counted(Coroutine[Any, Any, Any]):
    """A coroutine that tells of each of its suspensions."""

    def __init__(self, inner: Coroutine[Any, Any, Any], awaits: Awaits) -> None:
        self._inner = inner
        self._awaits = awaits

    def send(self, value: Any) -> Any:
        waited = self._inner.send(value)
        self._awaits.suspended(self._inner, waited)
        return waited

    def throw(self, *error: Any) -> Any:
        waited = self._inner.throw(*error)
        self._awaits.suspended(self._inner, waited)
        return waited

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._inner.__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # cr_running and the like, by which anyio knows what may be cancelled


Interruption = Callable[[Awaits, Any], None]


# --- one cycle ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """What there is to deliver, and what the destination answers to its first call; it accepts the others."""

    answer: str = "accepts"
    """accepts, partial, buries (a part of the batch), raises, rejects or unavailable."""
    waiting: bool = False
    """Delayed messages, and the suspect of a crash, instead of fresh ones."""
    commit: str = "delete"
    verb: str = "run_once"
    """The method of the relay that makes the cycle."""
    order: Literal["none", "key", "total"] = "none"
    on_failure: Literal["block", "park", "skip"] = "block"
    company: bool = False
    """Whether another relay, which does nothing, comes and gets its share of the slots."""

    def __str__(self) -> str:
        order = [] if self.order == "none" else [self.order, self.on_failure, *(["company"] if self.company else [])]
        return "-".join([self.verb, self.commit, self.answer, *(["waiting"] if self.waiting else []), *order])

    def relay(self, outbox: Outbox, pool: asyncpg.Pool, destination: "Destination") -> Relay:
        return Relay(
            outbox,
            pool,
            destination,
            batch_size=BATCH,
            concurrency=2,
            commit=CommitStrategy(self.commit),
            backoff=NoWaiting(),
            destination_backoff=NoWaiting(max_tries=-1),
            lease=LEASE,
            order=self.order,
            on_failure=self.on_failure,
        )


@dataclass
class Destination:
    """Notes what it accepts, with an await before and after."""

    answer: str
    note: Callable[[list[UUID]], None]
    calls: list[tuple[Message, ...]] = field(default_factory=list)
    inside: int = 0
    accepted: set[UUID] = field(default_factory=set)
    rejected: set[UUID] = field(default_factory=set)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def dispatch(self, *messages: Message) -> None:
        error = self._error(messages) if not self.calls else None
        self.calls.append(messages)
        self.inside += 1
        try:
            await asyncio.sleep(0)
            refused = set(error.failures) if isinstance(error, PartialDispatchError) else set()
            if error is None or refused:
                ids = [message.id for message in messages if message.id not in refused]
                self.note(ids)
                self.accepted |= set(ids)
                self.rejected |= {messages[0].id} if refused and self.answer == "buries" else set()
            await asyncio.sleep(0)
            if error:
                raise error
        finally:
            self.inside -= 1
        async with self._changed:
            self._changed.notify_all()

    async def is_finished(self, keys: "Keys", *, parks: bool) -> None:
        """Waits until all is accepted but what was rejected, and what is parked behind that."""

        def wanted() -> set[UUID]:
            parked = {keys[name] for name in self.rejected if parks}
            return {name for name, key in keys.items() if name not in self.rejected and key not in parked}

        async with self._changed:
            await self._changed.wait_for(lambda: wanted() <= self.accepted)

    def _error(self, messages: tuple[Message, ...]) -> Exception | None:
        match self.answer:
            case "partial":
                return PartialDispatchError({messages[-1].id: ValueError("no")})
            case "buries":
                # And those behind it: whoever delivers them lets them overtake, if the first comes again.
                behind = [one.id for one in messages[1:] if one.key is not None and one.key == messages[0].key]
                return PartialDispatchError(
                    {messages[0].id: Rejected("never"), **dict.fromkeys(behind, ValueError("no"))}
                )
            case "raises":
                return ValueError("no")
            case "rejects":
                return Rejected("never")
            case "unavailable":
                return DestinationUnavailableError("not now")
            case _:
                return None


Keys = Mapping[UUID, str | None]
"""The messages by their ids, in the order of their positions, each with its key."""


async def _at_once() -> None:
    pass


async def cycle(
    relay: Relay,
    scenario: Scenario,
    destination: Destination,
    keys: Keys,
    awaits: Awaits,
    *,
    until: Callable[[], Awaitable[None]] = _at_once,
) -> None:
    """Has the relay deliver one batch, or all messages and stop, in a task of its own whose awaits are counted."""

    async def stop() -> None:
        await destination.is_finished(keys, parks=scenario.on_failure == "park")
        await until()
        await relay.stop()

    stopping = asyncio.create_task(stop())
    with awaits.counted():
        await asyncio.wait([awaits.begin(relay.run_once() if scenario.verb == "run_once" else relay.run())])
    stopping.cancel()
    await asyncio.wait([stopping])


# --- processes that kill themselves -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    dsn: str
    schema: str
    table: str
    keys: dict[str, str | None]
    path: str
    at: int | Point
    scenario: dict[str, Any]


async def _cycle_in_a_process(order: _Order) -> None:
    scenario = Scenario(**order.scenario)
    file = os.open(order.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    # A whole batch in one write: a kill leaves no half of it.
    destination = Destination(
        scenario.answer, lambda ids: void(os.write(file, b"".join(f"{one}\n".encode() for one in ids)))
    )
    outbox = Outbox(order.table, schema=order.schema)
    at = order.at if isinstance(order.at, int) else Point(*order.at)  # JSON knows no tuples
    awaits = Awaits(at, lambda _, __: os.kill(os.getpid(), signal.SIGKILL))
    keys = {UUID(name): key for name, key in order.keys.items()}
    async with asyncpg.create_pool(order.dsn, min_size=2, max_size=2) as pool:
        await cycle(scenario.relay(outbox, pool, destination), scenario, destination, keys, awaits)
        awaits.task.result()


def void(_: object) -> None:
    pass


def _main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                asyncio.run(_cycle_in_a_process(_Order(**json.loads(line))))
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print("killed" if killed else "completed" if status == 0 else f"failed: {status}", flush=True)


@dataclass(frozen=True)
class Killer:
    """Runs cycles in processes of their own."""

    process: Process
    dsn: str

    async def kill(self, outbox: Outbox, scenario: Scenario, keys: Keys, path: Path, *, at: int | Point) -> bool:
        """Runs a cycle until the n-th await, or that point; returns False when it had fewer and is complete."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        names = {str(name): key for name, key in keys.items()}
        order = _Order(self.dsn, outbox.schema, outbox.table, names, str(path), at, asdict(scenario))
        self.process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
        line = (await self.process.stdout.readline()).decode().strip()
        assert line in {"killed", "completed"}, line
        return line == "killed"


@asynccontextmanager
async def killer(dsn: str) -> AsyncIterator[Killer]:
    """The process that forks the others."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.interrupted", stdin=PIPE, stdout=PIPE, cwd=Path(__file__).parent.parent
    )
    try:
        yield Killer(process, dsn)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with suppress(ConnectionError):
            await process.stdin.wait_closed()
        await process.wait()


def accepted_by_the_dead(path: Path) -> list[UUID]:
    """Which messages a destination accepted in a process that is dead."""
    return list(map(UUID, path.read_text().split())) if path.exists() else []


if __name__ == "__main__":
    _main()
