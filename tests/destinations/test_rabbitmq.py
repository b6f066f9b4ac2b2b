"""RabbitMQ, on a server of its own."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import uuid4

import aio_pika
import anyio
import asyncpg
import pytest
from aio_pika import DeliveryMode
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import ChannelNotFoundEntity, DeliveryError

from outbox import (
    DestinationUnavailableError,
    Message,
    Outbox,
    RejectedError,
)
from outbox.destinations.rabbitmq import RabbitMQDispatcher, received
from outbox.testing import CONTRACT, Case
from tests.destinations.brokers import ProcessBroker
from tests.destinations.failures import failures_of
from tests.destinations.rabbitmq_server import MEGABYTE, RabbitMQServer
from tests.destinations.relaying import check_the_whole_way
from tests.faults import FaultProxy


class RabbitMQ(ProcessBroker):
    too_large: int | None = MEGABYTE + 1
    unroutable: str | None = "nobody.is.bound.to.this"

    def __init__(self, server: RabbitMQServer) -> None:
        self.process = self.server = server
        self.topic = server.queue()
        self.connect: Callable[..., Any] = aio_pika.connect
        self._arrived: list[Message] = []
        self._news = asyncio.Event()

    def destination(self) -> RabbitMQDispatcher:
        return RabbitMQDispatcher(partial(self.connect, self.server.url), timeout=timedelta(seconds=2))

    async def received(self, count: int) -> Sequence[Message]:
        async with await aio_pika.connect(self.server.url) as client:
            channel = await client.channel()
            await channel.set_qos(1_000)
            queue = await channel.get_queue(self.topic, ensure=False)
            await queue.consume(self._arrive)
            while len(self._arrived) < count:
                await self._news.wait()
                self._news.clear()
        return self._arrived

    async def _arrive(self, raw: AbstractIncomingMessage) -> None:
        self._arrived.append(received(raw))
        self._news.set()
        await raw.ack()


@pytest.fixture
async def client(rabbitmq: RabbitMQServer) -> AsyncIterator[AbstractConnection]:
    async with await aio_pika.connect(rabbitmq.url) as client:
        yield client


@pytest.fixture
async def channel(client: AbstractConnection) -> AbstractChannel:
    return await client.channel()


@pytest.fixture
def broker(rabbitmq: RabbitMQServer) -> RabbitMQ:
    return RabbitMQ(rabbitmq)


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.__name__)
async def test_the_contract(case: Case, broker: RabbitMQ) -> None:
    await case(broker)


async def test_the_whole_way(broker: RabbitMQ, pool: "asyncpg.Pool[Any]", outbox: Outbox) -> None:
    await check_the_whole_way(broker, pool, outbox)


async def test_every_part_goes_where_amqp_has_a_place_for_it(broker: RabbitMQ, channel: AbstractChannel) -> None:
    recorded_at = datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=UTC)
    message = Message(
        {"order": 1}, topic=broker.topic, key="order-1", headers={"type": "placed", "a": "b"}, recorded_at=recorded_at
    )
    async with broker.destination() as destination:
        await destination.dispatch(message)
    raw = await _get(channel, broker.topic)
    assert (raw.body, raw.routing_key, raw.message_id, raw.type) == (
        b'{"order":1}',
        message.topic,
        str(message.id),
        "placed",
    )
    assert (raw.content_type, raw.delivery_mode, raw.timestamp) == (
        "application/json",
        DeliveryMode.PERSISTENT,
        recorded_at.replace(microsecond=0),
    )
    assert raw.headers == {
        "type": "placed",
        "a": "b",
        "outbox-key": "order-1",
        "outbox-recorded-at": recorded_at.isoformat(),
    }


@pytest.mark.parametrize("connect", [aio_pika.connect, aio_pika.connect_robust])
async def test_without_its_exchange_a_batch_fails_as_a_whole_until_somebody_declares_it(
    rabbitmq: RabbitMQServer, channel: AbstractChannel, connect: Callable[..., Any]
) -> None:
    name = f"events-{uuid4()}"
    batch = [Message(number, topic="orders.placed") for number in range(100)]
    async with RabbitMQDispatcher(partial(connect, rabbitmq.url), exchange=name) as destination:
        for _ in range(3):
            failures = await failures_of(destination, *batch)
            (error,) = set(failures.values())  # one for all: the relay blames none of them
            assert len(failures) == 100
            assert isinstance(error, ChannelNotFoundEntity)
        exchange = await channel.declare_exchange(name, aio_pika.ExchangeType.TOPIC, durable=True)
        queue = await channel.declare_queue(f"{name}-all", durable=True)
        await queue.bind(exchange, "orders.*")
        await destination.dispatch(*batch)
    assert [received(await _get(channel, queue.name)).id for _ in batch] == [message.id for message in batch]


@pytest.mark.parametrize(
    "bad",
    [
        Message(1, topic="t" * 256),
        Message(1, topic="\N{GREEK SMALL LETTER ALPHA}" * 128),
        Message(1, topic="t", headers={"n" * 129: "cut, it would not arrive as it was sent"}),
        Message(1, topic="t", headers={"large": "x" * 131_000}),
        Message(1, topic="t", headers={"many" + str(number): "x" * 100 for number in range(2_000)}),
        Message(1, topic="t", headers={"Outbox-Id": "mine"}),
        Message(1, topic="t", headers={"CC": "which the broker wants to be a list"}),
    ],
    ids=["topic", "letters", "name", "header", "headers", "taken", "refused"],
)
async def test_what_can_never_be_sent_is_rejected_alone(broker: RabbitMQ, bad: Message) -> None:
    good = [Message(number, topic=broker.topic, key="key", recorded_at=datetime.now(UTC)) for number in range(50)]
    async with broker.destination() as destination:
        failures = await failures_of(destination, *good[:25], bad, *good[25:])
        assert list(failures) == [bad.id]
        assert isinstance(failures[bad.id], RejectedError)
    first = dict.fromkeys(message.id for message in await broker.received(50))
    assert list(first) == [message.id for message in good]


async def test_what_just_fits_into_a_frame_arrives(broker: RabbitMQ) -> None:
    # A frame is 131,072 bytes; names, id and times take the rest of it.
    message = Message(1, topic=broker.topic, headers={"large": "x" * 130_900}, recorded_at=datetime.now(UTC))
    async with broker.destination() as destination:
        await destination.dispatch(message)
    (arrived,) = await broker.received(1)
    assert arrived.headers == message.headers


async def test_what_a_full_queue_refuses_fails_and_nobody_else(
    rabbitmq: RabbitMQServer, channel: AbstractChannel
) -> None:
    limits: Any = {"x-max-length": 3, "x-overflow": "reject-publish"}
    full = await channel.declare_queue(f"full-{uuid4()}", durable=True, arguments=limits)
    free = await channel.declare_queue(f"free-{uuid4()}", durable=True)
    batch = [Message(number, topic=(full, free)[number % 2].name) for number in range(20)]
    async with RabbitMQDispatcher(partial(aio_pika.connect, rabbitmq.url)) as destination:
        failures = await failures_of(destination, *batch)
    assert set(failures) == {message.id for message in batch[6::2]}
    assert {type(error) for error in failures.values()} == {DeliveryError}


async def test_while_an_alarm_blocks_the_broker_it_is_unavailable_and_nothing_is_piled_up(broker: RabbitMQ) -> None:
    batch = [Message(number, topic=broker.topic) for number in range(10)]
    async with broker.destination() as destination:
        await destination.dispatch(Message("first", topic=broker.topic))
        await broker.server.control("set_vm_memory_high_watermark", "0")
        try:
            for _ in range(3):
                failures = await failures_of(destination, *batch)
                assert len(failures) == 10
                assert {type(error) for error in failures.values()} == {DestinationUnavailableError}
        finally:
            await broker.server.control("set_vm_memory_high_watermark", "0.4")
        await destination.dispatch(*batch)
    arrived = [message.id for message in await broker.received(21)]
    assert max(arrived.count(message.id) for message in batch) == 2  # the first try, and the one that succeeded


async def test_a_connection_that_went_dead_without_a_word_is_replaced(broker: RabbitMQ) -> None:
    first, then = Message(1, topic=broker.topic), Message(2, topic=broker.topic)
    async with FaultProxy(broker.server.port) as network:
        connect = partial(aio_pika.connect, port=network.port)
        async with RabbitMQDispatcher(connect, timeout=timedelta(seconds=1)) as destination:
            await destination.dispatch(first)
            network.black_hole()
            assert isinstance((await failures_of(destination, then))[then.id], DestinationUnavailableError)
            network.heal()
            await destination.dispatch(then)
    assert {message.id for message in await broker.received(2)} == {first.id, then.id}


async def test_a_broker_that_freezes_on_a_batch_beyond_what_the_socket_holds_is_unavailable(broker: RabbitMQ) -> None:
    batch = [Message.from_body(b"x" * 1_000_000, topic=broker.topic) for number in range(50)]
    async with broker.destination() as destination:
        await destination.dispatch(batch[0])
        await broker.freeze()
        try:
            with anyio.fail_after(10):
                failures = await failures_of(destination, *batch)
                assert {type(error) for error in failures.values()} == {DestinationUnavailableError}
                assert len(failures) == 50
        finally:
            await broker.thaw()
        await destination.dispatch(*batch)
    assert {message.id for message in batch} <= {message.id for message in await broker.received(51)}


async def test_what_was_delivered_before_and_came_back_is_read_as_it_was_sent(
    rabbitmq: RabbitMQServer, channel: AbstractChannel
) -> None:
    quorum: Any = {"x-queue-type": "quorum"}
    queue = await channel.declare_queue(f"quorum-{uuid4()}", durable=True, arguments=quorum)
    message = Message(1, topic=queue.name, headers={"a": "b"})
    async with RabbitMQDispatcher(partial(aio_pika.connect, rabbitmq.url)) as destination:
        await destination.dispatch(message)
    await (await _get(channel, queue.name)).nack()
    raw = await _get(channel, queue.name)
    assert raw.headers["x-delivery-count"] == 1
    assert received(raw).headers == {"a": "b"}


async def test_a_consistent_hash_keeps_a_key_in_one_queue(rabbitmq: RabbitMQServer, channel: AbstractChannel) -> None:
    arguments: Any = {"hash-header": "outbox-key"}
    exchange = await channel.declare_exchange(
        f"spread-{uuid4()}", aio_pika.ExchangeType.X_CONSISTENT_HASH, durable=True, arguments=arguments
    )
    queues = [await channel.declare_queue(f"part-{uuid4()}", durable=True) for _ in range(3)]
    for queue in queues:
        await queue.bind(exchange, "10")
    batch = [Message(number, topic="orders.placed", key=f"key-{number % 20}") for number in range(200)]
    async with RabbitMQDispatcher(partial(aio_pika.connect, rabbitmq.url), exchange=exchange.name) as destination:
        await destination.dispatch(*batch)
    keys = [set[str | None]() for _ in queues]
    for part, queue in zip(keys, queues, strict=True):
        while raw := await queue.get(fail=False, no_ack=True):
            part.add(received(raw).key)
    assert sum(map(len, keys)) == len(set().union(*keys)) == 20
    assert all(keys)


async def _get(channel: AbstractChannel, queue: str) -> AbstractIncomingMessage:
    raw = await (await channel.get_queue(queue, ensure=False)).get(fail=False)
    assert raw, f"{queue} is empty"
    return raw
