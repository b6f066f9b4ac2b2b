"""A relay in a process of its own, for the tests that kill it; and, on the tests' side, what it delivered.

python -m tests.relay_process DSN SCHEMA FILE [lease=1] [batch_size=100] …
"""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import anyio
import asyncpg

from outbox import Message, Outbox, Relay

_SECONDS = {"lease", "grace", "dispatch_timeout"}
_WORDS = {"order", "on_failure"}


@dataclass(frozen=True)
class Delivery:
    """One line of the file that the destination writes."""

    id: UUID
    pid: int


class _FileDestination:
    """Appends a line for each message, a whole batch in one write: a kill leaves no half of a batch."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def dispatch(self, *messages: Message) -> None:
        os.write(self._file, b"".join(f"{message.id} {os.getpid()}\n".encode() for message in messages))


async def _main(dsn: str, schema: str, path: str, *options: str) -> None:
    settings = dict(option.split("=") for option in options)
    arguments = {name: _value(name, text) for name, text in settings.items()}
    async with asyncpg.create_pool(dsn, min_size=2, max_size=3) as pool:
        relay = Relay(Outbox(schema=schema), pool, _FileDestination(path), **arguments)  # type: ignore[arg-type]  # options from a command line
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: asyncio.ensure_future(relay.stop()))
        async with anyio.create_task_group() as group:
            await group.start(relay.run)
            print("ready", flush=True)


def _value(name: str, text: str) -> timedelta | str | int:
    if name in _SECONDS:
        return timedelta(seconds=float(text))
    return text if name in _WORDS else int(text)


def deliveries(path: Path) -> list[Delivery]:
    """Reads what was delivered so far, by all relays, in order."""
    # What is read while it is being written may end in the middle of a line.
    lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return [Delivery(UUID(line[:36]), int(line[37:])) for line in lines]


async def start_relay(dsn: str, schema: str, path: Path, **options: float | str) -> Process:
    """Starts a relay process and returns when it claims."""
    arguments = [dsn, schema, str(path), *(f"{name}={value}" for name, value in options.items())]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.relay_process", *arguments, stdout=PIPE, cwd=Path(__file__).parent.parent
    )
    assert process.stdout is not None
    line = await process.stdout.readline()
    assert line == b"ready\n", line
    return process


async def stop_relay(process: Process, number: signal.Signals = signal.SIGTERM) -> None:
    """Ends a relay process and waits for its end."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
    await process.wait()


@asynccontextmanager
async def relays(count: int, dsn: str, schema: str, path: Path, **options: float | str) -> AsyncIterator[list[Process]]:
    """So many relay processes, for the length of the block."""
    processes: list[Process] = []
    try:
        for _ in range(count):
            processes += [await start_relay(dsn, schema, path, **options)]
        yield processes
    finally:
        for process in processes:
            await stop_relay(process)


async def until_delivered(path: Path, ids: set[UUID]) -> None:
    """Waits until each of these has been delivered; the test's time limit ends it otherwise."""
    left = set(map(str, ids))
    async for lines in _written(path):
        left -= {line[:36] for line in lines}
        if not left:
            return


async def until_count(path: Path, count: int) -> None:
    """Waits until so many lines were written."""
    async for lines in _written(path):
        count -= len(lines)
        if count <= 0:
            return


async def _written(path: Path) -> AsyncIterator[list[str]]:
    """Yields the lines from the first one on, and for ever those that have come since."""
    rest = ""
    with open(path, "a+") as file:  # noqa: ASYNC230, PTH123 -- a file of the tests; it may not be there yet
        file.seek(0)
        while True:
            *lines, rest = (rest + file.read()).split("\n")
            yield lines
            await asyncio.sleep(0.03)  # the file is another process's, and has no event to wait for


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
