"""Redis Streams, on a server of its own that writes to disk before it answers."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from outbox import Message, Outbox, PartialDispatchError, RejectedError
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
