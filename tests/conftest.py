"""The servers, connections and tables that the tests share. `PG_BIN` chooses the PostgreSQL they run on."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any, Protocol
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest

from outbox import Outbox
from outbox.embedded import Server
from tests.faults import FaultProxy
from tests.pgbouncer import pgbouncer

_CLOSE_SECONDS = 5


class StartServer(Protocol):
    async def __call__(self, **settings: str) -> Server: ...


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The server of all tests, which none of them may kill; it trades durability for speed."""
    settings = {"fsync": "off", "full_page_writes": "off", "max_connections": "200", "wal_level": "logical"}
    server = Server(settings=settings)
    # It is bound to no event loop, so every test can have a loop of its own.
    with asyncio.Runner() as runner:
        runner.run(server.start())
        try:
            yield server
        finally:
            runner.run(server.stop())


@pytest.fixture
async def own_server() -> AsyncIterator[StartServer]:
    """Starts a server that the test may kill, durable unless told otherwise: `server = await own_server()`."""
    async with AsyncExitStack() as servers:

        async def start(**settings: str) -> Server:
            server = Server(settings=settings)
            servers.push_async_callback(server.stop)
            await server.start()
            return server

        yield start


@pytest.fixture
def dsn(server: Server) -> str:
    return server.dsn


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close(timeout=_CLOSE_SECONDS)


@pytest.fixture
async def pool(dsn: str) -> AsyncIterator[asyncpg.Pool[Any]]:
    pool = await asyncpg.create_pool(dsn, min_size=1, max_size=10)
    yield pool
    # A connection that somebody never gave back would keep the pool open for ever: that is an error here.
    async with asyncio.timeout(_CLOSE_SECONDS):
        await pool.close()


@pytest.fixture
async def outbox(dsn: str) -> AsyncIterator[Outbox]:
    """A migrated outbox in a schema of its own."""
    schema = f"test_{uuid4().hex}"
    outbox = Outbox("outbox", schema=schema)
    connection = await asyncpg.connect(dsn, server_settings={"lock_timeout": f"{_CLOSE_SECONDS}s"})
    try:
        await outbox.migrate(connection)
        yield outbox
        await connection.execute("SET client_min_messages = warning")
        await connection.execute(f'DROP SCHEMA "{schema}" CASCADE')
    finally:
        await connection.close(timeout=_CLOSE_SECONDS)


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[str]:
    """The DSN of an empty database, for those who use the outbox that has the default name."""
    name = f"test_{uuid4().hex}"
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(f"CREATE DATABASE {name}")
        yield urlsplit(dsn)._replace(path=f"/{name}").geturl()
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close(timeout=_CLOSE_SECONDS)


@pytest.fixture
async def proxy(dsn: str) -> AsyncIterator[FaultProxy]:
    """A network to break, in front of the common server: connect to `proxy.dsn(dsn)`."""
    async with FaultProxy(urlsplit(dsn).port or 0) as proxy:
        yield proxy


@pytest.fixture
async def pgbouncer_dsn(dsn: str) -> AsyncIterator[str]:
    """The common server through PgBouncer in transaction mode."""
    async with pgbouncer(dsn) as through:
        yield through
