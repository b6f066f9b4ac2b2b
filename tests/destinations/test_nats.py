"""NATS JetStream, on a server of its own."""

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import nats
import pytest
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, DiscardPolicy, StreamConfig

from outbox import DestinationUnavailableError, Message, Outbox, RejectedError
from outbox.destinations.nats import NatsDispatcher, received
from outbox.testing import CONTRACT, Case
from tests.destinations.brokers import ProcessBroker
from tests.destinations.failures import failures_of
from tests.destinations.nats_server import NatsServer
from tests.destinations.relaying import check_the_whole_way


class Nats(ProcessBroker):
    topic = "orders.placed"
    too_large: int | None = 1024 * 1024 + 1
    unroutable: str | None = "nobody.stores.this"

    def __init__(self, folder: Path, *options: str) -> None:
        self.process = self.server = NatsServer(folder, *options)
        self.url = self.server.url
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
                except TimeoutError:  # nats-py has two of its own, and also lets through that of asyncio
                    continue
                self._arrived += map(received, raws)
                self._next += len(raws)
        return self._arrived


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Nats]:
    broker = Nats(tmp_path)
    async with broker.server.running():
        yield broker


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.__name__)
async def test_the_contract(case: Case, broker: Nats) -> None:
    await case(broker)


@pytest.mark.parametrize(
    "poison",
    [
        Message.from_body(b"x" * 1024 * 1024, topic="orders.placed"),  # and its headers
        Message.from_body(b"x", topic="orders.placed", headers={"long": "x" * 1024 * 1024}),
        Message(1, topic="orders." + "x" * 5_000),
    ],
    ids=["body", "header", "topic"],
)
async def test_what_the_server_would_cut_the_connection_over_is_rejected_alone(broker: Nats, poison: Message) -> None:
    good = Message(1, topic=broker.topic)
    async with broker.destination() as destination:
        failures = await failures_of(destination, poison, good)
    assert list(failures) == [poison.id]
    assert isinstance(failures[poison.id], RejectedError)
    assert [message.id for message in await broker.received(1)] == [good.id]


async def test_a_topic_that_somebody_listens_to_but_no_stream_stores_is_a_failure_of_its_own(broker: Nats) -> None:
    """Nobody answers then, and that alone would be taken for a server that is down, again and again for ever."""
    lost = Message(1, topic="lost")
    async with await nats.connect(broker.url) as client, broker.destination() as destination:
        await client.subscribe(">")
        await client.flush()
        failures = await failures_of(destination, lost, Message(1, topic=broker.topic))
    assert list(failures) == [lost.id]
    assert not isinstance(failures[lost.id], DestinationUnavailableError)
    assert "no stream stores 'lost'" in str(failures[lost.id])


@pytest.mark.parametrize("is_all", [True, False])
async def test_only_a_stream_that_is_full_as_a_whole_is_unavailable(broker: Nats, is_all: bool) -> None:  # noqa: FBT001 -- a parameter of the test
    limits: dict[str, Any] = {"max_msgs": 1} if is_all else {"max_msgs_per_subject": 1, "discard_new_per_subject": True}
    full: Any = StreamConfig(name="FULL", subjects=["full.>"], discard=DiscardPolicy.NEW, **limits)
    first, second = Message(1, topic="full.one"), Message(2, topic="full.one")
    async with await nats.connect(broker.url) as client, broker.destination() as destination:
        await client.jetstream().add_stream(full)
        failures = await failures_of(destination, first, second)
    assert list(failures) == [second.id]
    assert isinstance(failures[second.id], DestinationUnavailableError) is is_all


async def test_an_account_without_storage_left_is_unavailable(tmp_path: Path) -> None:
    settings = tmp_path / "settings"
    settings.write_text(
        "accounts { A { users: [{user: a, password: a}], jetstream { max_file: 10K } } }, no_auth_user: a"
    )
    broker = Nats(tmp_path, "-c", str(settings))
    first, second = (Message.from_body(b"x" * 9_000, topic=broker.topic) for _ in range(2))
    async with broker.server.running(), broker.destination() as destination:
        failures = await failures_of(destination, first, second)
    assert list(failures) == [second.id]
    assert isinstance(failures[second.id], DestinationUnavailableError)


async def test_the_whole_way(broker: Nats, pool: "asyncpg.Pool[Any]", outbox: Outbox) -> None:
    await check_the_whole_way(broker, pool, outbox)
