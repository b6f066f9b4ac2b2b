"""Redis Streams, on a server of its own that writes to disk before it answers."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from outbox import DestinationUnavailableError, Message, Outbox, PartialDispatchError, RejectedError
from outbox.destinations.redis import RedisDispatcher, received
from outbox.testing import CONTRACT, Case
from tests.destinations.brokers import Process, ProcessBroker, free_port, listens, program
from tests.destinations.relaying import check_the_whole_way

MEGABYTE = 1024 * 1024


class RedisServer(ProcessBroker):
    too_large: int | None = MEGABYTE + 1
    unroutable: str | None = "not-a-stream"

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.client = Redis(port=port)
        settings = {
            "bind": "127.0.0.1",
            "port": str(port),
            "dir": str(folder),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "proto-max-bulk-len": str(MEGABYTE),
        }
        command = [program("redis-server"), *(part for name, one in settings.items() for part in (f"--{name}", one))]
        self.process = Process(command, partial(listens, port))
        self._arrived: list[Message] = []
        self._last: bytes = b"0"

    def destination(self) -> AbstractAsyncContextManager[RedisDispatcher]:
        return nullcontext(RedisDispatcher(self.client, max_body=MEGABYTE, timeout=timedelta(seconds=2)))

    async def received(self, count: int) -> Sequence[Message]:
        while len(self._arrived) < count:
            answer: Any = await self.client.xread({self.topic: self._last}, count=1_000, block=200)
            for stream, entries in answer:
                self._arrived += [received(stream, fields) for _, fields in entries]
                self._last = entries[-1][0]
        return self._arrived


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RedisServer]:
    broker = RedisServer(tmp_path)
    await broker.start()
    try:
        await broker.client.set("not-a-stream", "a string")
        yield broker
    finally:
        await broker.client.aclose()
        await broker.stop()


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.__name__)
async def test_the_contract(case: Case, broker: RedisServer) -> None:
    await case(broker)


async def test_the_whole_way(broker: RedisServer, pool: "asyncpg.Pool[Any]", outbox: Outbox) -> None:
    await check_the_whole_way(broker, pool, outbox)


async def test_a_stream_is_trimmed_to_about_the_length_that_was_asked_for(broker: RedisServer) -> None:
    destination = RedisDispatcher(broker.client, max_length=100)
    await destination.dispatch(*[Message(number, topic="trimmed") for number in range(1_000)])
    assert 100 <= await broker.client.xlen("trimmed") < 300


async def test_a_header_with_a_name_of_the_librarys_own_is_rejected_alone(broker: RedisServer) -> None:
    bad = Message(1, topic=broker.topic, headers={"Outbox-Id": "mine"})
    good = Message(2, topic=broker.topic)
    with pytest.raises(PartialDispatchError) as caught:
        await RedisDispatcher(broker.client).dispatch(bad, good)
    assert list(caught.value.failures) == [bad.id]
    assert isinstance(caught.value.failures[bad.id], RejectedError)
    assert [message.id for message in await broker.received(1)] == [good.id]


@pytest.mark.parametrize(
    "poison",
    [
        Message.from_body(b"x" * (MEGABYTE + 1), topic="contract"),
        Message.from_body(b"x", topic="contract", headers={"long": "x" * (MEGABYTE + 1)}),
    ],
    ids=["body", "header"],
)
async def test_a_server_that_cuts_the_connection_over_what_it_was_sent_is_not_down(
    broker: RedisServer, poison: Message
) -> None:
    """Taken for that, it would be sent again and again for ever, and all the others of its batch with it."""
    destination = RedisDispatcher(broker.client, timeout=timedelta(seconds=2))  # who does not know the server's limit
    with pytest.raises((RedisError, TimeoutError)):
        await destination.dispatch(poison, Message(1, topic=broker.topic))
    await destination.dispatch(Message(1, topic=broker.topic))


async def test_a_server_that_writes_nothing_now_is_unavailable(broker: RedisServer) -> None:
    message = Message(1, topic=broker.topic)
    await broker.client.config_set("min-replicas-to-write", 1)
    with pytest.raises(PartialDispatchError) as caught:
        await RedisDispatcher(broker.client).dispatch(message)
    assert isinstance(caught.value.failures[message.id], DestinationUnavailableError)
    assert "NOREPLICAS" in str(caught.value.failures[message.id])


async def test_a_dispatch_that_was_cancelled_reads_no_answers_of_another(broker: RedisServer) -> None:
    """A connection that goes back with answers still to come would give them to the next batch."""
    destination = RedisDispatcher(broker.client)
    await destination.dispatch(Message(0, topic=broker.topic))
    await broker.freeze()
    for _ in range(20):
        with anyio.move_on_after(0.02):
            await destination.dispatch(*[Message(1, topic=broker.topic) for _ in range(10)])
    await broker.thaw()
    bad = Message(2, topic="not-a-stream")
    with pytest.raises(PartialDispatchError) as caught:
        await destination.dispatch(bad, Message(2, topic=broker.topic))
    assert list(caught.value.failures) == [bad.id]
    assert len(await broker.client.client_list()) <= 2
