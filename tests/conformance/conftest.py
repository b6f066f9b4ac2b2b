import asyncpg
import pytest

from outbox import Outbox


@pytest.fixture
async def connection(connection: asyncpg.Connection, outbox: Outbox) -> asyncpg.Connection:
    """A connection to whose statements the outbox's tables are simply there, and a table `orders` beside them."""
    await connection.execute(f'SET search_path = "{outbox.schema}"')
    await connection.execute("CREATE TABLE orders (number integer PRIMARY KEY)")
    return connection
