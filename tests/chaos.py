"""Writers, relays, a moody destination and every fault there is, for minutes; then the record of it is judged.

    python -m tests.chaos [--seconds 120] [--seed N] [--mode NAME] [--replay FILE]

The seed decides the schedule of faults, which is printed, and what everybody throws dice for; when things happen to
the millisecond it cannot decide, so a run with the same seed is the same storm and not the same history. The history
of a run that broke a promise is kept in a file, and `--replay` judges it again.

What it says when nothing is broken, of the storm that was printed and no other: no message that was committed was
lost, none was invented, altered, or delivered though it was rolled back; dead letters are those, and only those, that
the destination rejects or that stand behind one of them; what was delivered twice was in the hands of somebody to whom
something had happened; the first deliveries of each lane came in order, late commits included; everything came to an
end within a minute, and left nothing claimed, owned or registered. What it does not say: that a writer who is passed
over costs no more than its own order, as none takes so long here; that a duplicate was inevitable, as after a death
all that a relay can have held is excused; how fast anything is; anything of a prepared transaction, a failover to a
standby, a pooler, a full disk, relays of two orders side by side, or a change of the settings between two runs.

The clock of the database is set forward and back, by more than a lease, where libfaketime is installed (`make chaos`
installs it for root). The relays use the database's clock and, for the length of their own lease, a monotonic one,
which nobody can set: a step of *their* wall clock has nothing to act on.
"""

import argparse
import asyncio
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import asyncpg

from outbox import CommitStrategy, Outbox
from outbox.embedded import Server
from tests.chaos_operator import Operator
from tests.chaos_relay import BATCH, CONCURRENCY, GRACE, LEASE, Setup
from tests.chaos_writers import GONE, Writers
from tests.clock import REFRESH, Clock, without
from tests.faults import FaultProxy
from tests.history.checker import History, Verdict, check
from tests.history.journal import Journal


@dataclass(frozen=True, slots=True)
class Mode:
    """How the relays of a run work, and so what is promised of their order."""

    order: Literal["none", "key", "total"]
    on_failure: Literal["block", "park", "skip"]
    commit: CommitStrategy

    @property
    def ordered(self) -> bool:
        return self.order != "none"

    @property
    def held(self) -> int:
        """Messages that one relay has in its hands at most: fresh ones, waiting ones, and a suspect of a crash."""
        window = max(200, (4 if self.ordered else 2) * BATCH * CONCURRENCY)
        # In order, four windows of what is queued behind its own lane.
        return (4 if self.ordered else 1) * window + window // 2 + 1

    @property
    def relays(self) -> int:
        """Relays at most; in total order one works and the others watch, and it is the one that faults should hit."""
        return 3 if self.order == "total" else 6


MODES: Final = {
    "none-delete": Mode("none", "block", CommitStrategy.DELETE),
    "none-mark": Mode("none", "block", CommitStrategy.MARK),
    "key-block-delete": Mode("key", "block", CommitStrategy.DELETE),
    "key-block-mark": Mode("key", "block", CommitStrategy.MARK),
    "key-park-delete": Mode("key", "park", CommitStrategy.DELETE),
    "key-park-mark": Mode("key", "park", CommitStrategy.MARK),
    "key-skip-delete": Mode("key", "skip", CommitStrategy.DELETE),
    "key-skip-mark": Mode("key", "skip", CommitStrategy.MARK),
    "total-block-delete": Mode("total", "block", CommitStrategy.DELETE),
    "total-block-mark": Mode("total", "block", CommitStrategy.MARK),
    "total-skip-delete": Mode("total", "skip", CommitStrategy.DELETE),
    "total-skip-mark": Mode("total", "skip", CommitStrategy.MARK),
}

_WRITERS: Final = 4
_BACKLOG: Final = 3_000
"""Messages that may be under way before the writers wait; in a short run fewer, as they all have to be delivered."""
_BACKLOG_PER_SECOND: Final = 150
_UNFLUSHED: Final = 2.0
_STRIKE_SECONDS: Final = 0.5
"""How long a fault waits for a relay to which it can happen."""
_DRAIN_SECONDS: Final = 60.0
_CONNECTIONS: Final = 60

_WEIGHTS: Final = {
    "kill": 6,
    "leave": 3,
    "join": 3,
    "freeze": 3,
    "long freeze": 3,
    "server kill": 2,
    "terminated backends": 4,
    "latency": 3,
    "reset": 4,
    "black hole": 3,
    "pool exhausted": 2,
    "server full": 1,
    "held snapshot": 1,
    "long writer": 3,
    "clock step": 2,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of the schedule."""

    at: float
    kind: str
    target: int
    """Which relay, counted among those to which it can happen."""
    seconds: float


def schedule(seed: str, seconds: float) -> list[Fault]:
    """Deals the faults: first each once, then by their weights; at least one every second and a half.

    The last is a death of the server: what it makes a relay forget is not healed by that relay's own death any more.
    """
    dice, faults, at = random.Random(seed), list[Fault](), 1.0
    lengths = {
        "long freeze": (LEASE * 1.2, LEASE * 2.5),
        "freeze": (0.2, LEASE / 2),
        "held snapshot": (5.0, 30.0),
        "long writer": (1.0, 4.0),
        "clock step": (LEASE, LEASE * 3),
    }
    deck = list(_WEIGHTS)
    dice.shuffle(deck)
    gap = min(1.0, seconds / 2 / len(deck))
    while at < seconds:
        kind = deck.pop()
        length = dice.uniform(*lengths.get(kind, (0.3, 3.0)))
        shortest = lengths[kind][0] if kind in {"long freeze", "long writer"} else 0.3
        length = min(length, max(shortest, seconds - at))  # not to outlast the rest, if it need not
        faults.append(Fault(at, kind, dice.randrange(60), length))
        at += dice.uniform(0.5, 1.5) * gap
        if not deck:
            deck = [one for one, weight in _WEIGHTS.items() for _ in range(weight)]
            dice.shuffle(deck)
    return [*faults, Fault(seconds, "server kill", 0, 1.0)]


@dataclass(eq=False)
class _Slot:
    """A place for a relay process, with a network of its own in every other one."""

    number: int
    proxy: FaultProxy | None
    process: Process | None = None
    is_busy: bool = False
    """It is being started, killed or stopped: other faults choose somebody else."""

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    @property
    def name(self) -> str:
        return f"chaos-{self.number}"

    @property
    def is_alive(self) -> bool:
        """Whether something can happen to its network; one that has ended by itself is reported at the end."""
        return self.process is not None and self.process.returncode is None

    @property
    def is_able(self) -> bool:
        """Whether something can happen to it."""
        return self.is_alive and not self.is_busy


@dataclass
class Run:
    """One run in one mode."""

    name: str
    mode: Mode
    seed: str
    server: Server
    journal: Journal
    writers: Writers
    operator: Operator | None
    slots: list[_Slot]
    clock: Clock | None
    injected: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    _births: Iterator[int] = field(default_factory=count)
    _dark: list[tuple[int, float]] = field(default_factory=list)
    _server_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _mended: list[float] = field(default_factory=list)
    _is_stepping: bool = False

    async def run(self, seconds: float) -> None:
        """Has everybody at work while the faults happen, and then lets them come to an end."""
        enough = asyncio.Event()
        await self.writers.prepare()
        if self.operator:
            await self.operator.prepare()
        for slot in self.slots[: 1 + random.Random(self.seed).randrange(4)]:
            await self.start_relay(slot)
        async with asyncio.TaskGroup() as group:
            operating = group.create_task(self.operator.run()) if self.operator else None
            writing = group.create_task(self.writers.run(_WRITERS, enough))
            await self.storm(schedule(self.seed, seconds))
            enough.set()
            await writing
            await self.finish()
            if operating:
                operating.cancel()
        if self.operator:
            self.broken += self.operator.broken

    # --- relays -----------------------------------------------------------------------------------------

    async def start_relay(self, slot: _Slot) -> None:
        """Starts a relay process in an empty slot, and returns when it can be stopped; it may not have a database."""
        dsn = slot.proxy.dsn(self.server.dsn) if slot.proxy else self.server.dsn
        setup = Setup(
            dsn=dsn,
            journal=str(self.journal.path),
            name=slot.name,
            seed=f"{self.seed}-{next(self._births)}",
            commit=self.mode.commit.value,
            order=self.mode.order,
            on_failure=self.mode.on_failure,
        )
        with self.journal.path.with_suffix(".log").open("ab") as log:
            slot.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.chaos_relay",
                setup.dumps(),
                stdout=PIPE,
                stderr=log,
                cwd=_ROOT,
                env=without(),
            )
        assert slot.process.stdout
        if await slot.process.stdout.readline() != b"running\n":
            self.broken.append(f"relay {slot.pid} did not start, see the log")

    async def stop_relay(self, slot: _Slot) -> None:
        """Lets a relay end in order, and notes it if it does not, or if it could not settle what it held."""
        since, process = monotonic(), slot.process
        assert process
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(GRACE + 3):
                status = await process.wait()
        except TimeoutError:
            self.broken.append(f"relay {process.pid} did not stop within its grace period")
            process.kill()
            status = await process.wait()
        else:
            if status:
                self.broken.append(f"relay {process.pid} ended with status {status}, see the log")
        if status or any(pid in {0, process.pid} and end > since for pid, end in self._dark):
            self.journal.note_span("end", process.pid, monotonic())
        slot.process = None

    async def kill_relay(self, slot: _Slot) -> None:
        """SIGKILL; what it had in its hands is judged as that of a killed relay."""
        assert slot.process
        with suppress(ProcessLookupError):
            slot.process.kill()
        await slot.process.wait()
        self.journal.note_span("end", slot.pid, monotonic())
        slot.process = None

    # --- faults -----------------------------------------------------------------------------------------

    async def storm(self, faults: Sequence[Fault]) -> None:
        """Lets each fault happen at its time, next to those that still last, and returns when all are over."""
        began = monotonic()
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await asyncio.sleep(max(0.0, began + fault.at - monotonic()))
                group.create_task(self._inject(fault))

    async def _inject(self, fault: Fault) -> None:
        match fault.kind:
            case "join":
                happened = await self._join()
            case "server kill":
                happened = await self._kill_server(fault.seconds)
            case "server full":
                happened = await self._fill_server(fault.seconds)
            case "held snapshot":
                happened = await self._hold_snapshot(fault.seconds)
            case "long writer":
                happened = await self._write_for_long(fault)
            case "clock step":
                happened = await self._step(fault)
            case _:
                happened = await self._strike(fault)
        if happened:
            self.injected[fault.kind] += 1
            self._mended.append(monotonic())

    async def _step(self, fault: Fault) -> bool:
        """Sets the clock of the database, and some time later right again: two steps."""
        if self.clock is None or self._is_stepping:
            return False
        self._is_stepping = True
        offset = fault.seconds if fault.target % 2 else -fault.seconds
        self.clock.set(offset)
        await asyncio.sleep(REFRESH + fault.seconds / 2)
        with suppress(*GONE):
            async with self._connected() as connection:
                seen = await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8") - time.time()
                if abs(seen - offset) > 1:
                    self.broken.append(f"the clock of the server is {seen:+.1f} s off, not {offset:+.1f} s")
        self.clock.set(0)
        await asyncio.sleep(REFRESH)
        self._is_stepping = False
        return True

    async def _strike(self, fault: Fault) -> bool:
        """What happens to one relay, as soon as there is one to which it can happen."""
        ends = monotonic() + _STRIKE_SECONDS
        while not (able := self._able(fault.kind)):
            if monotonic() > ends:
                return False
            await asyncio.sleep(0.05)
        slot = able[fault.target % len(able)]
        match fault.kind:
            case "kill":
                await self._kill(slot, fault.seconds)
            case "leave":
                await self._leave(slot)
            case "freeze" | "long freeze":
                await self._freeze(slot, fault.seconds)
            case "terminated backends":
                with self._cut(slot.pid, 1.0):
                    await self._terminate(slot.name if fault.target % 3 else "chaos-%")
            case "pool exhausted":
                await self._exhaust(slot)
            case _:
                await self._disturb(slot, fault)
        return True

    def _able(self, kind: str) -> list[_Slot]:
        if kind in {"latency", "reset", "black hole"}:
            return [one for one in self.slots if one.is_alive and one.proxy]
        return [one for one in self.slots if one.is_able]

    async def _join(self) -> bool:
        for slot in self.slots:
            if not slot.process and not slot.is_busy:
                with _busy(slot):
                    await self.start_relay(slot)
                return True
        return False

    async def _kill(self, slot: _Slot, seconds: float) -> None:
        with _busy(slot):
            await self.kill_relay(slot)
            await asyncio.sleep(seconds / 2)
            await self.start_relay(slot)

    async def _leave(self, slot: _Slot) -> None:
        with _busy(slot):
            await self.stop_relay(slot)
            if not any(one.process for one in self.slots):
                await self.start_relay(slot)

    async def _freeze(self, slot: _Slot, seconds: float) -> None:
        with _busy(slot):
            assert slot.process
            since = monotonic()
            slot.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(seconds)
            with suppress(ProcessLookupError):
                slot.process.send_signal(signal.SIGCONT)
            self.journal.note_span("freeze", slot.pid, since)

    async def _terminate(self, name: str) -> None:
        with suppress(*GONE):
            async with self._connected() as connection:
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE $1", name
                )

    async def _exhaust(self, slot: _Slot) -> None:
        with _busy(slot), self._cut(slot.pid, LEASE):
            assert slot.process
            slot.process.send_signal(signal.SIGUSR1)
            await self._terminate(slot.name)
            await asyncio.sleep(LEASE)

    async def _disturb(self, slot: _Slot, fault: Fault) -> None:
        """What a network does."""
        assert slot.proxy
        # After a black hole the relay finds out only when its limits have passed.
        with self._cut(slot.pid, LEASE if fault.kind == "black hole" else 1.0):
            match fault.kind:
                case "reset":
                    slot.proxy.reset()
                case "latency":
                    slot.proxy.latency = timedelta(seconds=fault.seconds / 50)
                    await asyncio.sleep(fault.seconds)
                    slot.proxy.latency = timedelta()
                case _:
                    slot.proxy.black_hole()
                    await asyncio.sleep(fault.seconds)
                    slot.proxy.heal()

    async def _kill_server(self, seconds: float) -> bool:
        async with self._server_lock:
            # What the relays commit is not flushed at once, and lost if nobody else's commit brings it to the disk.
            calm = seconds / 6
            self.writers.calm_until = monotonic() + 2 * calm
            await asyncio.sleep(calm)
            since = monotonic()
            with self._cut(0, 1.0):
                await self.server.kill()
                self.journal.note_span("server_kill", 0, since)
                await asyncio.sleep(seconds / 3)
                await self.server.start()
        return True

    async def _fill_server(self, seconds: float) -> bool:
        """Takes all connections the server has, and then those of the relays as well."""
        async with AsyncExitStack() as connections:
            with self._cut(0, 1.0):
                await self._terminate("chaos-%")
                with suppress(*GONE):
                    for _ in range(_CONNECTIONS):
                        await connections.enter_async_context(self._connected())
                await asyncio.sleep(seconds)
        return True

    async def _hold_snapshot(self, seconds: float) -> bool:
        with suppress(*GONE):
            async with self._connected() as connection:
                await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                await connection.execute("SELECT count(*) FROM outbox")
                await asyncio.sleep(seconds)
        return True

    async def _write_for_long(self, fault: Fault) -> bool:
        with suppress(*GONE):
            await self.writers.linger(fault.seconds, fault.target)
        return True

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator["asyncpg.Connection[Any]"]:
        connection = await asyncpg.connect(self.server.dsn, timeout=5)
        try:
            yield connection
        finally:
            connection.terminate()

    @contextmanager
    def _cut(self, pid: int, aftermath: float) -> Iterator[None]:
        """Notes the time in which a relay, or with 0 each of them, hardly reached its database."""
        since = monotonic()
        number = len(self._dark)
        self._dark.append((pid, float("inf")))
        try:
            yield
        finally:
            until = monotonic() + aftermath
            self._dark[number] = pid, until
            self.journal.note_span("cut", pid, since, until)

    # --- the end ----------------------------------------------------------------------------------------

    async def finish(self) -> None:
        """Waits until all is delivered, stops the relays, and looks whether anything is held."""
        for slot in self.slots:
            if slot.process and slot.process.returncode is not None:
                self.broken.append(
                    f"relay {slot.pid} ended by itself with status {slot.process.returncode}, see the log"
                )
                slot.process = None
        if not any(slot.process for slot in self.slots):
            await self.start_relay(self.slots[0])
        living = sum(1 for slot in self.slots if slot.process)
        if self.operator:
            self.operator.is_final = True
        async with self._connected() as connection:
            await self._drain(connection, living)
            await asyncio.gather(*(self.stop_relay(slot) for slot in self.slots if slot.process))
            await self._look(connection)
            await self._write_down(connection)

    async def _drain(self, connection: "asyncpg.Connection[Any]", living: int) -> None:
        left = f"({_PENDING}) + ({_DEAD})" if self.operator else f"({_PENDING})"
        query = f"SELECT {left}, (SELECT count(*) FROM outbox_relays)"  # noqa: S608 -- our own statement
        ends, state = monotonic() + _DRAIN_SECONDS, None
        while monotonic() < ends:
            state = tuple(await connection.fetchrow(query) or ())
            if state == (0, living):
                return
            await asyncio.sleep(0.1)
        self.broken.append(f"not done after {_DRAIN_SECONDS:.0f} s: messages and relays are {state}, not (0, {living})")

    async def _look(self, connection: "asyncpg.Connection[Any]") -> None:
        for what, query in {
            "messages left": f"SELECT ({_PENDING})",
            "claims held": "SELECT count(*) FROM outbox_claims",
            "relays registered": "SELECT count(*) FROM outbox_relays",
            "waiting messages owned": "SELECT count(*) FROM outbox_waiting WHERE owner IS NOT NULL",
            "slots owned": "SELECT count(*) FROM outbox_slots WHERE owner IS NOT NULL",
        }.items():
            if number := await connection.fetchval(query):
                self.broken.append(f"{number} {what} after everybody has left")
        kept = {str(row[0]) for row in await connection.fetch("SELECT id FROM outbox WHERE dispatched_at IS NOT NULL")}
        wanted = {str(row[0]) for row in await connection.fetch("SELECT id FROM orders WHERE NOT rejected")}
        if self.mode.commit is CommitStrategy.DELETE and kept:
            self.broken.append(f"{len(kept)} messages are marked, and should be deleted")
        if self.mode.commit is CommitStrategy.MARK and kept != wanted:
            self.broken.append(f"{len(kept)} messages are marked, and {len(wanted)} were to be delivered")

    async def _write_down(self, connection: "asyncpg.Connection[Any]") -> None:
        number = {name: index for index, name in enumerate(self.writers.commits)}
        orders = [
            [str(row["id"]), row["position"], row["key"], row["body"], row["delayed"], row["rejected"]]
            for row in await connection.fetch("SELECT * FROM orders ORDER BY position")
        ]
        committed = {row[0] for row in orders}
        self.journal.note(
            "settings",
            order=self.mode.order,
            on_failure=self.mode.on_failure,
            lease=LEASE,
            held=self.mode.held,
            unflushed=_UNFLUSHED,
        )
        self.journal.note("committed", messages=[[*row, number.get(row[0])] for row in orders])
        self.journal.note("rolled_back", messages=sorted(self.writers.attempted - committed))
        dead = await connection.fetch("SELECT id, behind FROM outbox_dead WHERE behind <> position")
        self.journal.note("parked", messages=[[str(row[0]), row[1]] for row in dead])
        dead = await connection.fetch("SELECT id FROM outbox_dead")
        self.journal.note("dead", messages=[str(row[0]) for row in dead])
        if self.operator:
            discarded = await connection.fetch("SELECT id FROM discarded")
            self.journal.note("discarded", messages=[str(row[0]) for row in discarded])

    def recovery(self, history: History) -> float:
        """Returns the longest time from the end of a fault to the next message that was delivered."""
        taken = sorted(one.answered or one.begun for one in history.deliveries)
        waits, index = [0.0], 0
        for mended in sorted(self._mended):
            while index < len(taken) and taken[index] < mended:
                index += 1
            if index < len(taken):
                waits.append(taken[index] - mended)
        return max(waits)


_ROOT: Final = Path(__file__).parent.parent
_DEAD: Final = "SELECT count(*) FROM outbox_dead"
_PENDING: Final = """
    SELECT (SELECT count(*) FROM outbox WHERE dispatched_at IS NULL) + (SELECT count(*) FROM outbox_waiting)"""


@contextmanager
def _busy(slot: _Slot) -> Iterator[None]:
    slot.is_busy = True
    try:
        yield
    finally:
        slot.is_busy = False


class _Tail:
    """Counts the messages that the destination took, by reading on where it stopped reading."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self.count = 0

    def read(self) -> int:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines, _, rest = file.read().rpartition(b"\n")
            self._offset = file.tell() - len(rest)
        self.count += sum(line.count(b"],[") + 1 for line in lines.split(b"\n") if line.startswith(b'{"do":"took"'))
        return self.count


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a run."""

    mode: str
    seed: str
    injected: Counter[str]
    history: History
    verdict: Verdict
    broken: list[str]
    recovery: float

    def __str__(self) -> str:
        history, verdict = self.history, self.verdict
        faults = sum(self.injected.values())
        rows = {
            "faults injected": f"{faults}: {', '.join(f'{n} {kind}' for kind, n in sorted(self.injected.items()))}",
            "relays taken for dead": len(history.fences),
            "messages": f"{len(history.committed)} committed, {len(history.rolled_back)} rolled back",
            "late commits": len(verdict.late),
            "deliveries": len(history.deliveries),
            "lost": len(verdict.lost),
            "invented": len(verdict.invented) + len(verdict.uncommitted) + len(verdict.altered),
            "duplicated": f"{len(verdict.explained)} explained, {len(verdict.unexplained)} unexplained",
            "dead letters": f"{len(history.dead)}, and {len(history.discarded)} discarded, of "
            f"{sum(one.rejected for one in history.committed.values())} that the destination rejects",
            "parked": f"{len({name for name, _ in history.parked})} behind "
            f"{len({head for _, head in history.parked})} others",
            "out of order": f"{len(verdict.disordered)}{'' if MODES[self.mode].ordered else ' (not promised)'}",
            "longest recovery": f"{self.recovery:.1f} s",
        }
        lines = [f"{self.mode}, seed {self.seed}", *(f"  {name:22} {value}" for name, value in rows.items())]
        return "\n".join([*lines, *(f"  BROKEN: {sentence}" for sentence in self.broken)])


async def run(name: str, seed: str, seconds: float, folder: Path) -> Report:
    """Runs one mode for about so many seconds, and judges what happened."""
    mode, path, outbox = MODES[name], folder / f"{name}.jsonl", Outbox()
    parks = mode.on_failure == "park"
    path.unlink(missing_ok=True)
    journal, tail = Journal(path), _Tail(path)
    backlog = min(_BACKLOG, _BACKLOG_PER_SECOND * seconds)
    async with AsyncExitStack() as stack:
        stack.callback(journal.close)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outbox-clock-")))
        clock = Clock(place / "offset") if Clock.library() else None
        if clock:
            stack.enter_context(clock.under())
        # The time in which commits that are not waited for reach the disk, at most three of these, is made longer.
        server = Server(settings={"max_connections": str(_CONNECTIONS), "wal_writer_delay": "500ms"})
        stack.push_async_callback(server.stop)
        await server.start()
        proxies = [await stack.enter_async_context(FaultProxy(urlsplit(server.dsn).port or 0)) for _ in range(3)]
        slots = [_Slot(number, None if number % 2 else proxies[number // 2]) for number in range(mode.relays)]
        writers = Writers(
            server.dsn, outbox, seed, lambda: len(writers.commits) - tail.read() < backlog, mendable=parks
        )
        operator = Operator(server.dsn, outbox, journal, seed) if parks else None
        chaos = Run(name, mode, seed, server, journal, writers, operator, slots, clock)
        stack.push_async_callback(_kill_all, slots)
        await chaos.run(seconds)
    history = History.read(path.read_text(errors="replace").splitlines())
    verdict = check(history)
    if history.passed_over:
        chaos.broken.append(f"{history.passed_over} times a writer was passed over, and none takes so long")
    broken = [*chaos.broken, *verdict.violations(ordered=mode.ordered)]
    return Report(name, seed, chaos.injected, history, verdict, broken, chaos.recovery(history))


async def _kill_all(slots: Sequence[_Slot]) -> None:
    for slot in slots:
        if slot.process and slot.process.returncode is None:
            slot.process.kill()
            await slot.process.wait()


def _replay(path: Path, mode: Mode) -> int:
    verdict = check(History.read(path.read_text(errors="replace").splitlines()))
    violations = verdict.violations(ordered=mode.ordered)
    print("\n".join(violations) or "nothing was broken")
    return bool(violations)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the modes one after the other; returns 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="for all modes together, without their ends")
    parser.add_argument("--seed", help="of an earlier run, to have the same schedule again")
    parser.add_argument("--mode", choices=["all", *MODES], default="all")
    parser.add_argument("--replay", type=Path, help="judge the history in this file instead")
    options = parser.parse_args(arguments)
    names = list(MODES) if options.mode == "all" else [options.mode]
    if options.replay:
        return _replay(options.replay, MODES[names[0]])
    seed = options.seed or secrets.token_hex(4)
    folder, reports = Path(tempfile.mkdtemp(prefix="outbox-chaos-")), []
    for name in names:
        seconds = options.seconds / len(names)
        print(f"{name}, seed {seed}, the schedule:")
        print("\n".join(f"  {one.at:6.1f} s  {one.kind}, {one.seconds:.1f} s" for one in schedule(seed, seconds)))
        reports.append(asyncio.run(run(name, seed, seconds, folder)))
        print(reports[-1], flush=True)
    if any(report.broken for report in reports):
        print(f"the histories are kept, see --replay, and the logs of the relays: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
