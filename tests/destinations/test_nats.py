"""NATS JetStream, on a server of its own."""

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import nats
import pytest
from nats.errors import TimeoutError as NothingYet
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from outbox import Message, Outbox
from outbox.destinations.nats import NatsDispatcher, received
from outbox.testing import CONTRACT, Case
from tests.destinations.brokers import Process, ProcessBroker, free_port, listens, program
from tests.destinations.relaying import check_the_whole_way


class Nats(ProcessBroker):
    topic = "orders.placed"
    too_large: int | None = 1024 * 1024 + 1
    unroutable: str | None = "nobody.stores.this"

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url = f"nats://127.0.0.1:{port}"
        command = [program("nats-server"), "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(folder)]
        self.process = Process(command, partial(listens, port))
        self._arrived: list[Message] = []
        self._next = 1

    def destination(self) -> NatsDispatcher:
        return NatsDispatcher(partial(nats.connect, self.url), timeout=timedelta(seconds=2))

    async def received(self, count: int) -> Sequence[Message]:
        async with await nats.connect(self.url) as client:
            start = ConsumerConfig(
                ack_policy=AckPolicy.NONE, deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=self._next
            )
            subscription = await client.jetstream().pull_subscribe(self.topic, stream="ORDERS", config=start)
            while len(self._arrived) < count:
                try:
                    raws = await subscription.fetch(1_000, timeout=0.2)
                except NothingYet:
                    continue
                self._arrived += map(received, raws)
                self._next += len(raws)
        return self._arrived


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Nats]:
    broker = Nats(tmp_path)
    await broker.start()
    try:
        async with await nats.connect(broker.url) as client:
            await client.jetstream().add_stream(name="ORDERS", subjects=["orders.>"])
        yield broker
    finally:
        await broker.stop()


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.__name__)
async def test_the_contract(case: Case, broker: Nats) -> None:
    await case(broker)


async def test_the_whole_way(broker: Nats, pool: "asyncpg.Pool[Any]", outbox: Outbox) -> None:
    await check_the_whole_way(broker, pool, outbox)
