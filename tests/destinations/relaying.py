"""The whole way: committed rows, a real relay, and a broker that is down at first and killed in the middle."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import asyncpg

from outbox import DestinationDown, Event, ExponentialBackOff, Message, Outbox, OutboxDispatcher, Relay
from outbox.testing import Broker

COUNT = 3_000
SECONDS = 45


async def check_the_whole_way(broker: Broker, pool: asyncpg.Pool[Any], outbox: Outbox, *, count: int = COUNT) -> None:
    """Asserts that all that was committed arrives, as it was, that nothing else does, and that nobody died."""
    messages = [
        Message({"number": number}, topic=broker.topic, key=f"key-{number % 50}", recorded_at=datetime.now(UTC))
        for number in range(count)
    ]
    async with pool.acquire() as connection:
        async with connection.transaction():
            await OutboxDispatcher(connection, outbox).dispatch(*messages)
        rolled_back = connection.transaction()
        await rolled_back.start()
        await OutboxDispatcher(connection, outbox).dispatch(Message("never", topic=broker.topic))
        await rolled_back.rollback()
    down = asyncio.Event()

    def hook(event: Event) -> None:
        if isinstance(event, DestinationDown):
            down.set()

    with anyio.fail_after(SECONDS):
        await broker.stop()
        async with broker.destination() as destination:
            quick = ExponentialBackOff(initial=timedelta(milliseconds=50), maximum=timedelta(seconds=1), max_tries=-1)
            relay = Relay(outbox, pool, destination, hooks=[hook], backoff=quick, destination_backoff=quick)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(relay.run)
                await down.wait()
                await broker.start()
                await broker.received(count // 3)
                await broker.stop()
                await broker.start()
                await _arrived(broker, {message.id for message in messages}, pool, outbox)
                await relay.stop()
    async with pool.acquire() as connection:
        counts = await outbox.counts(connection)
    assert (counts.total, counts.dead) == (0, 0)


async def _arrived(broker: Broker, wanted: set[Any], pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    arrived = await broker.received(len(wanted))
    while missing := wanted - {message.id for message in arrived}:
        arrived = await broker.received(len(arrived) + len(missing))
    assert {message.id for message in arrived} == wanted
    # What arrived and was not acknowledged arrives again, a little later.
    async with pool.acquire() as connection:
        while (await outbox.counts(connection)).total:  # noqa: ASYNC110 -- a table tells nobody
            await anyio.sleep(0.01)  # as above
