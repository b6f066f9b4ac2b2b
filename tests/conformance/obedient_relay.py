"""A relay in a process of its own, whose destination does as it is told: `RelayProcess` starts one and tells it.

python -m tests.conformance.obedient_relay DSN SCHEMA ORDER

Each call of the destination prints a line of JSON, `[[number, id], …]`, and reads a line: `accept`, or `exit` for
`os._exit`, an end without an exception or any cleaning up.
"""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import asyncpg

from outbox import Message, NoWaiting, Outbox, Relay

Order = Literal["none", "key", "total"]

LEASE = timedelta(seconds=1)
"""How soon its death is noticed."""
BACKOFF = NoWaiting(max_tries=0)
"""Its messages die of their first failure."""


class _Obedient:
    async def dispatch(self, *messages: Message) -> None:
        print(json.dumps([[message.payload["number"], str(message.id)] for message in messages]), flush=True)
        word = await asyncio.to_thread(sys.stdin.readline)
        if word != "accept\n":
            os._exit(1)


async def _main(dsn: str, schema: str, order: Order) -> None:
    settings: dict[str, Any] = {"concurrency": 1, "lease": LEASE, "backoff": BACKOFF, "order": order}
    async with asyncpg.create_pool(dsn, min_size=2, max_size=2) as pool:
        await Relay(Outbox(schema=schema), pool, _Obedient(), **settings).run()


@dataclass
class RelayProcess:
    """The process, seen from the test."""

    _process: Process

    async def given(self) -> dict[int, UUID]:
        """Waits for a call of the destination; returns the ids of its messages by number."""
        assert self._process.stdout is not None
        return {number: UUID(name) for number, name in json.loads(await self._process.stdout.readline())}

    def tell(self, word: Literal["accept", "exit"]) -> None:
        """Answers the call."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n".encode())

    async def ended(self) -> int:
        """Waits for its end; returns the exit status."""
        return await self._process.wait()

    async def kill(self) -> None:
        """SIGKILL, if it still runs."""
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


@asynccontextmanager
async def relay_process(dsn: str, outbox: Outbox, order: Order = "none") -> AsyncIterator[RelayProcess]:
    """A relay process, killed at the end of the block at the latest."""
    command = [sys.executable, "-m", "tests.conformance.obedient_relay", dsn, outbox.schema, order]
    root = Path(__file__).parent.parent.parent
    process = RelayProcess(await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, cwd=root))
    try:
        yield process
    finally:
        await process.kill()


if __name__ == "__main__":
    dsn, schema, order = sys.argv[1:]
    asyncio.run(_main(dsn, schema, order))  # type: ignore[arg-type]  # from a command line
