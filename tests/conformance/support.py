"""What the conformance tests share: messages with numbers, relays in the background, and eyes on the database."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any, Generic, TypeVar

import anyio
import asyncpg
from asyncpg.connection import LoggedQuery

from outbox import Event, Message, Outbox, OutboxDispatcher, Relay

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)

_T = TypeVar("_T")
_E = TypeVar("_E", bound=Event)


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


class Log(Generic[_T]):
    """Keeps what it is called with, and can be waited on."""

    def __init__(self) -> None:
        self._seen: list[_T] = []
        self._news = asyncio.Event()

    def __call__(self, one: _T) -> None:
        self._seen.append(one)
        self._news.set()
        self._news = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until something has been logged after which this is true."""
        while not condition():
            await self._news.wait()


class Events(Log[Event]):
    """A relay's hook that keeps the events."""

    def of(self, kind: type[_E]) -> list[_E]:
        return [event for event in self._seen if isinstance(event, kind)]

    async def wait_for(self, kind: type[_E], count: int = 1) -> list[_E]:
        await self.until(lambda: len(self.of(kind)) >= count)
        return self.of(kind)


class Executed(Log[LoggedQuery]):
    """What the connections of a pool have executed."""

    def arguments(self, statement: str) -> list[tuple[Any, ...]]:
        """Those of each execution of this statement."""
        return [query.args for query in self._seen if query.query == statement]

    async def wait_for(self, statement: str) -> tuple[Any, ...]:
        """Waits for an execution of this statement; returns the arguments of the last."""
        await self.until(lambda: bool(self.arguments(statement)))
        return self.arguments(statement)[-1]


@asynccontextmanager
async def watched_pool(dsn: str) -> AsyncIterator[tuple[asyncpg.Pool, Executed]]:
    """A pool, and what its connections execute."""
    executed = Executed()

    async def watch(connection: asyncpg.Connection) -> None:
        connection.add_query_logger(executed)

    async with asyncpg.create_pool(dsn, min_size=2, max_size=4, init=watch) as pool:
        yield pool, executed


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
    await prepare(connection, begin, statement)
    answer = await explain(connection, begin, *arguments)
    await connection.execute("DEALLOCATE planned")
    return answer


async def prepare(connection: asyncpg.Connection, begin: str, statement: str) -> None:
    """Prepares a statement for `explain` as a relay does."""
    await connection.execute(begin)
    await connection.execute(f"PREPARE planned AS {statement}")
    await connection.execute("COMMIT")


async def explain(connection: asyncpg.Connection, begin: str, *arguments: object) -> dict[str, Any]:
    """Runs what was prepared, undoes it, and returns the top node of its plan with what it touched."""
    await connection.execute(begin)
    execute = f"EXECUTE planned ({', '.join(map(_literal, arguments))})"
    answer = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {execute}")
    await connection.execute("ROLLBACK")
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
