"""What the conformance tests share: messages with numbers, relays in the background, and eyes on the database."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import anyio
import asyncpg
from asyncpg.connection import LoggedQuery

from outbox import Event, Message, Outbox, OutboxDispatcher, Relay

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)

_T = TypeVar("_T", bound=Event)


def numbered(count: int, start: int = 1) -> list[Message]:
    """So many messages whose payloads count upwards."""
    return [Message({"number": number}, topic="numbers") for number in range(start, start + count)]


def numbers(messages: Iterable[Message]) -> list[int]:
    return [message.payload["number"] for message in messages]


async def write(pool: asyncpg.Pool, outbox: Outbox, *messages: Message) -> None:
    """Dispatches the messages in a transaction of their own."""
    async with pool.acquire() as connection, connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(*messages)


async def orders(connection: asyncpg.Connection) -> list[int]:
    """The numbers in the business table."""
    return [row[0] for row in await connection.fetch("SELECT number FROM orders ORDER BY number")]


@asynccontextmanager
async def running(*relays: Relay) -> AsyncIterator[None]:
    """Runs relays in the background for the length of the block, then stops them, which settles what they know."""
    async with anyio.create_task_group() as group:
        for relay in relays:
            await group.start(relay.run)
        yield
        for relay in relays:
            group.start_soon(relay.stop)


class Events:
    """A hook that keeps the events and can be waited on."""

    def __init__(self) -> None:
        self._seen: list[Event] = []
        self._news = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self._seen.append(event)
        self._news.set()
        self._news = asyncio.Event()

    def of(self, kind: type[_T]) -> list[_T]:
        return [event for event in self._seen if isinstance(event, kind)]

    async def wait_for(self, kind: type[_T], count: int = 1) -> list[_T]:
        while len(self.of(kind)) < count:
            await self._news.wait()
        return self.of(kind)


@contextmanager
def statements(connection: Any) -> Iterator[list[str]]:
    """Collects what the connection executes; the last statement is there one turn of the event loop later."""
    sent: list[str] = []

    def log(query: LoggedQuery) -> None:
        sent.append(query.query)

    with connection.query_logger(log):
        yield sent


async def plan(connection: asyncpg.Connection, begin: str, statement: str, *arguments: object) -> dict[str, Any]:
    """Runs a statement in a relay's own kind of transaction, undoes it, and returns the top node of its plan."""
    await connection.execute(begin)
    await connection.execute(f"PREPARE planned AS {statement}")
    execute = f"EXECUTE planned ({', '.join(map(_literal, arguments))})"
    answer = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {execute}")
    await connection.execute("ROLLBACK; DEALLOCATE planned")
    top: dict[str, Any] = json.loads(answer)[0]["Plan"]
    return top


def _literal(argument: object) -> str:
    return str(argument) if isinstance(argument, bool | int) else f"'{argument}'"


def nodes(top: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All nodes of a plan."""
    yield top
    for child in top.get("Plans", []):
        yield from nodes(child)


def touched(top: dict[str, Any]) -> int:
    """How many pages a plan has looked at, each visit counted."""
    pages: int = top["Shared Hit Blocks"] + top["Shared Read Blocks"]
    return pages
