"""Measures what an order costs, against the same relays without one, in one run: `make bench-order`.

Relays are processes of their own, all idle while one group works. The groups "none" and "key" have a table each on
one server, and take their turns round by round (A B A B); a ratio is that of the medians. What each relay delivered is
put together by the clock of the machine, and must be each key's messages in the exact order of their positions.
"""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import argparse
import asyncio
import json
import mmap
import pickle
import signal
import struct
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any, Literal

import asyncpg
from rich.console import Console
from rich.table import Table

from outbox import Message, Outbox, Relay, embedded

Order = Literal["none", "key", "total"]

_FILL = """
    INSERT INTO {}.outbox (id, topic, key, headers, payload)
    SELECT gen_random_uuid(), 'orders', 'key-' || (n % $2), '{{}}', $3 FROM generate_series(1, $1) AS n"""
_BODY = b'{"text":"' + b"x" * 290 + b'"}'
_LOADS = ((1_000, 100_000), (20, 100_000), (1, 20_000))
"""Keys, and messages in all."""
_LEASE = timedelta(seconds=10)


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    work: str
    floor_name: str
    floor: float
    ours: float
    unit: str = "messages/s"

    @property
    def ratio(self) -> float:
        """Ours to the floor."""
        return self.ours / self.floor


# --- a relay in a process of its own ------------------------------------------------------------------------


class Recording:
    """A destination that remembers what it got and when, and counts where the parent can see it."""

    def __init__(self, counter: Path | None, seconds: float = 0.0) -> None:
        self.calls: list[tuple[float, Sequence[Message]]] = []
        self._seconds = seconds
        self.count = 0
        self._map: mmap.mmap | None = None
        if counter:
            with counter.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), 8)

    async def reaches(self, count: int) -> float:
        """Waits until so many were accepted; returns when."""
        await _until(lambda: self.count >= count)
        return self.calls[-1][0]

    async def dispatch(self, *messages: Message) -> None:
        """Accepts."""
        if self._seconds:
            await asyncio.sleep(self._seconds)
        self.calls.append((monotonic(), messages))
        self.count += len(messages)
        if self._map:
            struct.pack_into("q", self._map, 0, self.count)


async def _relay(dsn: str, schema: str, order: Order, folder: Path, settings: dict[str, Any]) -> None:
    """Relays until SIGTERM; at each SIGUSR1 writes down what was delivered since the last one."""
    destination, loop = Recording(folder / "count"), asyncio.get_running_loop()

    def write_down() -> None:
        calls, destination.calls = destination.calls, []
        facts = [(at, [(message.key, message.position) for message in messages]) for at, messages in calls]
        part = folder / "calls.part"
        part.write_bytes(pickle.dumps(facts))
        part.rename(folder / "calls")

    async with asyncpg.create_pool(dsn, min_size=2, max_size=3) as pool:
        relay = Relay(Outbox(schema=schema), pool, destination, order=order, lease=_LEASE, **settings)
        loop.add_signal_handler(signal.SIGTERM, lambda: asyncio.ensure_future(relay.stop()))
        loop.add_signal_handler(signal.SIGUSR1, write_down)
        print("ready", flush=True)
        await relay.run()


@dataclass
class Group:
    """Relays of one order, on a table of their own."""

    outbox: Outbox
    order: Order
    folders: list[Path]
    processes: list[Process]

    def count(self) -> int:
        """How many messages all of them delivered so far."""
        return sum(struct.unpack("q", (folder / "count").read_bytes())[0] for folder in self.folders)

    async def deliveries(self) -> list[tuple[float, list[tuple[str, int]]]]:
        """What they delivered since the last time, by the time of the delivery."""
        for process in self.processes:
            process.send_signal(signal.SIGUSR1)
        calls: list[Any] = []
        for folder in self.folders:
            path = folder / "calls"
            await _until(path.exists)
            calls += pickle.loads(path.read_bytes())  # noqa: S301 -- written by a child of ours
            path.unlink()
        return sorted(calls)


@asynccontextmanager
async def _group(dsn: str, order: Order, relays: int, pool: asyncpg.Pool[Any], **settings: Any) -> AsyncIterator[Group]:
    name = "_".join(["bench", order, str(relays), *map(str, settings.values())])
    outbox = Outbox(schema=name)
    async with pool.acquire() as connection:
        await outbox.migrate(connection)
    with tempfile.TemporaryDirectory(prefix="outbox-bench-") as temporary:
        group = Group(outbox, order, [Path(temporary) / str(number) for number in range(relays)], [])
        try:
            for folder in group.folders:
                folder.mkdir()
                (folder / "count").write_bytes(bytes(8))
                arguments = [dsn, outbox.schema, order, str(folder), json.dumps(settings)]
                group.processes.append(
                    await asyncio.create_subprocess_exec(sys.executable, __file__, "--relay", *arguments, stdout=PIPE)
                )
            for process in group.processes:
                if process.stdout:
                    await process.stdout.readline()
            await _until_shared(pool, group, relays)
            yield group
        finally:
            for process in group.processes:
                if process.returncode is None:
                    process.terminate()
                    await process.wait()


async def _until_shared(pool: asyncpg.Pool[Any], group: Group, relays: int) -> None:
    if group.order == "key":
        slots = f"{group.outbox.schema}.outbox_slots"
        query = f"SELECT count(DISTINCT owner) = $1 AND count(owner) = 64 FROM {slots}"  # noqa: S608 -- our own schema
        while not await pool.fetchval(query, relays):  # noqa: ASYNC110 -- a row, no event
            await asyncio.sleep(0.1)


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 -- what another process does, and a no-op destination, have no event
        await asyncio.sleep(0.005)


# --- measuring ----------------------------------------------------------------------------------------------


async def drain(pool: asyncpg.Pool[Any], group: Group, keys: int, messages: int) -> float:
    """Has the group deliver a backlog that appears at once; returns messages a second."""
    before = group.count()
    await pool.execute(_FILL.format(group.outbox.schema), messages, keys, _BODY)
    started = monotonic()
    await _until(lambda: group.count() - before >= messages)
    calls = await group.deliveries()
    _check(calls, messages, ordered=group.order != "none")
    return messages / (calls[-1][0] - started)


def _check(calls: list[tuple[float, list[tuple[str, int]]]], messages: int, *, ordered: bool) -> None:
    by_key: defaultdict[str, list[int]] = defaultdict(list)
    for _, batch in calls:
        for key, position in batch:
            by_key[key].append(position)
    got = [position for positions in by_key.values() for position in positions]
    if len(got) != messages or len(set(got)) != messages:
        raise AssertionError(f"{messages} messages made {len(got)} deliveries of {len(set(got))}")
    if ordered and any(positions != sorted(positions) for positions in by_key.values()):
        raise AssertionError("out of order")


async def keys(dsn: str, pool: asyncpg.Pool[Any], rounds: int) -> list[Result]:
    """Throughput by key against the same relays without an order; for one key, against one batch at a time."""
    results = []
    async with _group(dsn, "none", 1, pool, concurrency=1) as serial:
        for relays in (1, 2, 4):
            async with _group(dsn, "none", relays, pool) as free, _group(dsn, "key", relays, pool) as ordered:
                for count, messages in _LOADS:
                    floor = free if count > 1 else serial
                    figures: tuple[list[float], list[float]] = [], []
                    for round_number in range(rounds + 1):  # the first one only warms up
                        for kind, group in enumerate((floor, ordered)):
                            figure = await drain(pool, group, count, messages)
                            if round_number:
                                figures[kind].append(figure)
                    name = f"{count:,} keys, {relays} relay(s)" if count > 1 else f"one key, {relays} relay(s)"
                    against = (
                        f"no order, {relays} relay(s)" if count > 1 else "no order, one relay, one batch at a time"
                    )
                    results.append(Result(name, against, median(figures[0]), median(figures[1])))
    return results


async def slow_destination(pool: asyncpg.Pool[Any], rounds: int) -> list[Result]:
    """A destination that takes 10 ms for a batch of 100, eighteen at once, against one at a time."""

    async def measure(order: Order, count: int, concurrency: int) -> float:
        messages = 6_000 * concurrency  # so that each takes as long, and the start of the relay weighs as little
        outbox = Outbox(schema=f"slow_{order}")
        async with pool.acquire() as connection:
            await outbox.migrate(connection)
        await pool.execute(_FILL.format(outbox.schema), messages, count, _BODY)
        destination = Recording(None, seconds=0.01)
        started = monotonic()
        async with _running(Relay(outbox, pool, destination, order=order, concurrency=concurrency)):
            return messages / (await destination.reaches(messages) - started)

    serial = [await measure("none", 1_000, 1) for _ in range(rounds)]
    results = []
    loads: tuple[tuple[Order, int], ...] = (("none", 1_000), ("key", 1_000), ("key", 20))
    for order, count in loads:
        figures = [await measure(order, count, 18) for _ in range(rounds)]
        name = f"10 ms a batch, order {order!r}, {count:,} keys, 18 at once"
        results.append(Result(name, "one batch at a time", median(serial), median(figures)))
    return results


async def old_snapshot(pool: asyncpg.Pool[Any], messages: int = 600_000) -> list[Result]:
    """One relay for all of it while a snapshot keeps every dead row: its last tenth against its first."""
    results = []
    orders: tuple[Order, ...] = ("none", "key", "total")
    for order in orders:
        outbox, part, figures = Outbox(schema=f"held_{order}"), messages // 10, list[float]()
        async with pool.acquire() as connection:
            await outbox.migrate(connection)
        destination = Recording(None)
        async with (
            pool.acquire() as holder,
            holder.transaction(isolation="repeatable_read"),
            _running(Relay(outbox, pool, destination, order=order)),
        ):
            await holder.fetchval(f"SELECT count(*) FROM {outbox.schema}.outbox")  # noqa: S608 -- our own schema
            for _ in range(10):
                destination.calls.clear()
                destination.count = 0
                await pool.execute(_FILL.format(outbox.schema), part, 1_000, _BODY)
                started = monotonic()
                figures.append(part / (await destination.reaches(part) - started))
        name = f"order {order!r}, the last of {messages:,} under a held snapshot"
        results.append(Result(name, "the first of them", median(figures[:3]), median(figures[-3:])))
    return results


async def takeover(dsn: str, pool: asyncpg.Pool[Any]) -> Result:
    """Kills one of four relays: how long until the last of its keys flows again, against the lease and a second."""
    count, killed = 200, 0
    async with _group(dsn, "key", 4, pool) as group:
        schema = group.outbox.schema
        stop = asyncio.Event()

        async def writing() -> None:
            while not stop.is_set():
                await pool.execute(_FILL.format(schema), count, count, _BODY)
                await asyncio.sleep(0.05)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(writing())
            await asyncio.sleep(1)  # of traffic, so that each key flows
            group.processes[killed].kill()
            at = monotonic()
            await group.processes[killed].wait()
            del group.processes[killed], group.folders[killed]
            await asyncio.sleep(_LEASE.total_seconds() + 3)  # for as long as it may take, and more
            stop.set()
        calls = await group.deliveries()
    first_after: dict[str, float] = {}
    for when, batch in calls:
        if when > at:
            for key, _ in batch:
                first_after.setdefault(key, when)
    if len(first_after) < count:
        raise AssertionError(f"only {len(first_after)} of {count} keys flow")
    longest = max(first_after.values()) - at
    return Result("one of 4 killed: its keys flow again", "lease + 1 s", _LEASE.total_seconds() + 1, longest, "s")


@asynccontextmanager
async def _running(relay: Relay) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(relay.run())
        yield
        await relay.stop()


async def main(rounds: int) -> list[Result]:
    """Runs everything on a server of its own."""
    async with (
        embedded.postgres(shared_buffers="256MB", max_connections="100") as dsn,
        asyncpg.create_pool(dsn, min_size=4, max_size=20) as pool,
    ):
        results = await keys(dsn, pool, rounds)
        results += await slow_destination(pool, rounds)
        results += await old_snapshot(pool)
        return [*results, await takeover(dsn, pool)]


def report(results: list[Result]) -> None:
    """Prints the table."""
    table = Table("work", "against", "its figure", "ours", "unit", "ratio", title="What an order costs")
    for result in results:
        floor, ours = (f"{figure:,.{1 if result.unit == 's' else 0}f}" for figure in (result.floor, result.ours))
        table.add_row(result.work, result.floor_name, floor, ours, result.unit, f"{result.ratio:.2f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--relay", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.relay:
        url, schema, order, folder, settings = arguments.relay
        asyncio.run(_relay(url, schema, order, Path(folder), json.loads(settings)))
    else:
        measured = asyncio.run(main(arguments.rounds))
        report(measured)
        if arguments.json:
            figures = [asdict(result) | {"ratio": result.ratio} for result in measured]
            arguments.json.write_text(json.dumps(figures, indent=2))
