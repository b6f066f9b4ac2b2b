"""`PostgresDispatcher`: the contract, exactly-once copies, and a fan-out whose parts do not wait for each other."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from outbox import (
    DestinationUnavailableError,
    Inbox,
    Message,
    Outbox,
    OutboxDispatcher,
    OutboxError,
    Relay,
    SchemaError,
)
from outbox.destinations.postgres import PostgresDispatcher
from outbox.embedded import Server
from outbox.testing import CONTRACT, Broker, Case, CollectingDispatcher, drain
from tests.conftest import StartServer
from tests.faults import FaultProxy


class OtherDatabase(Broker):
    def __init__(self, server: Server, network: FaultProxy, pool: asyncpg.Pool[Any]) -> None:
        self.server = server
        self.network = network
        self.pool = pool
        self.outbox = Outbox()

    def destination(self) -> AbstractAsyncContextManager[PostgresDispatcher]:
        return nullcontext(PostgresDispatcher(self.pool, self.outbox, timeout=timedelta(seconds=3)))

    async def received(self, count: int) -> Sequence[Message]:
        while True:
            connection = await asyncpg.connect(self.server.dsn)
            try:
                messages = await self.outbox.retrieve(connection, 100_000)
            finally:
                await connection.close()
            if len(messages) >= count:
                return messages
            await asyncio.sleep(0.05)  # why a sleep: what is in the table has no event

    async def stop(self) -> None:
        await self.server.kill()

    async def start(self) -> None:
        await self.server.start()

    async def freeze(self) -> None:
        self.network.black_hole()

    async def thaw(self) -> None:
        self.network.heal()


@pytest.fixture
async def broker(own_server: StartServer) -> AsyncIterator[OtherDatabase]:
    server = await own_server()
    async with (
        FaultProxy(urlsplit(server.dsn).port or 0) as network,
        asyncpg.create_pool(network.dsn(server.dsn), min_size=0, max_size=4) as pool,
    ):
        broker = OtherDatabase(server, network, pool)
        async with pool.acquire() as connection:
            await broker.outbox.migrate(connection)
        yield broker
        pool.terminate()


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.__name__)
async def test_the_contract(case: Case, broker: OtherDatabase) -> None:
    await case(broker)


async def test_a_copy_that_was_written_already_is_left_out_with_an_inbox(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    inbox = Inbox(schema=outbox.schema)
    async with pool.acquire() as connection:
        await inbox.migrate(connection)
    seen, fresh = Message(1, topic="t"), Message(2, topic="t")
    destination = PostgresDispatcher(pool, outbox, inbox=inbox)
    await destination.dispatch(seen)
    await destination.dispatch(seen, fresh)
    await destination.dispatch(seen)  # of which nothing is left to write
    async with pool.acquire() as connection:
        assert [message.id for message in await outbox.retrieve(connection, 10)] == [seen.id, fresh.id]


async def test_what_was_accepted_is_written_or_neither_is(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    inbox = Inbox(schema=outbox.schema)
    async with pool.acquire() as connection:
        await inbox.migrate(connection)
    missing = Outbox("missing", schema=outbox.schema)
    message = Message(1, topic="t")
    with pytest.raises(SchemaError):
        await PostgresDispatcher(pool, outbox, missing, inbox=inbox).dispatch(message)
    await PostgresDispatcher(pool, outbox, inbox=inbox).dispatch(message)
    async with pool.acquire() as connection:
        assert [one.id for one in await outbox.retrieve(connection, 10)] == [message.id]


async def test_a_message_that_a_trigger_refuses_is_not_taken_for_a_database_that_is_away(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    refuse = f'"{outbox.schema}".refuse'
    async with pool.acquire() as connection:
        await connection.execute(
            f"CREATE FUNCTION {refuse}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$;"
            f'CREATE TRIGGER refuse BEFORE INSERT ON "{outbox.schema}".{outbox.table} FOR EACH ROW '
            f"WHEN (NEW.topic = 'bad') EXECUTE FUNCTION {refuse}()"
        )
    destination = PostgresDispatcher(pool, outbox)
    with pytest.raises(OutboxError, match="not this one") as caught:
        await destination.dispatch(Message(1, topic="bad"), Message(2, topic="good"))
    assert not isinstance(caught.value, DestinationUnavailableError)
    await destination.dispatch(Message(2, topic="good"))


async def test_destinations_with_a_table_each_do_not_hold_each_other_back(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    quick, hanging = Outbox("to_quick", schema=outbox.schema), Outbox("to_hanging", schema=outbox.schema)
    async with pool.acquire() as connection, connection.transaction():
        await quick.migrate(connection)
        await hanging.migrate(connection)
        await OutboxDispatcher(connection, outbox).dispatch(*[Message(number, topic="t") for number in range(500)])
    arrived, never = CollectingDispatcher(), Never()
    relays = [
        Relay(outbox, pool, PostgresDispatcher(pool, quick, hanging)),
        Relay(quick, pool, arrived),
        Relay(hanging, pool, never, grace=timedelta(seconds=2)),
    ]
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        for relay in relays:
            tasks.create_task(relay.run())
        await arrived.wait_for(500)
        await never.called.wait()
        for relay in relays:
            await relay.stop()
    assert sorted(message.payload for message in arrived.messages) == list(range(500))
    assert sorted(message.payload for message in await drain(hanging, pool)) == list(range(500))


class Never:
    """Does not come back."""

    def __init__(self) -> None:
        self.called = asyncio.Event()

    async def dispatch(self, *_: Message) -> None:
        self.called.set()
        await asyncio.Event().wait()


def test_without_a_table_it_refuses() -> None:
    pool: Any = None
    with pytest.raises(ValueError, match="at least one outbox"):
        PostgresDispatcher(pool)
