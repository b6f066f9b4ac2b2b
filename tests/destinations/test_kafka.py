"""Kafka: on librdkafka's mock cluster, which is no Kafka broker, and on a real one where KAFKA_BOOTSTRAP names it."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import Any
from unittest import SkipTest
from uuid import uuid4

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from outbox import (
    DestinationUnavailableError,
    Dispatcher,
    Message,
    Outbox,
    PartialDispatchError,
    RejectedError,
)
from outbox.destinations.kafka import KafkaDispatcher, received
from outbox.testing import CONTRACT, Broker, Case
from tests.destinations.kafka_mock import INVALID_PRODUCER_EPOCH, MESSAGE_TOO_LARGE, MockCluster
from tests.destinations.relaying import check_the_whole_way

MISSING = "missing"
LIMIT = timedelta(seconds=2)


class Kafka(Broker):
    """What both clusters have in common: how to write and how to read."""

    too_large: int | None = 1024 * 1024
    unroutable: str | None = None
    check_crcs = True

    def __init__(self, bootstrap_servers: str) -> None:
        self.bootstrap_servers = bootstrap_servers
        self._arrived: list[Message] = []
        self._next: dict[TopicPartition, int] = {}

    def destination(self, **settings: Any) -> AbstractAsyncContextManager[Dispatcher]:
        return KafkaDispatcher(self.bootstrap_servers, timeout=LIMIT, **settings)

    async def received(self, count: int) -> Sequence[Message]:
        servers = self.bootstrap_servers
        consumer = AIOKafkaConsumer(
            self.topic, bootstrap_servers=servers, isolation_level="read_committed", check_crcs=self.check_crcs
        )
        await consumer.start()
        try:
            for partition in consumer.assignment():
                consumer.seek(partition, self._next.get(partition, 0))
            while len(self._arrived) < count:
                for partition, records in (await consumer.getmany(timeout_ms=100)).items():
                    self._arrived += map(received, records)
                    self._next[partition] = records[-1].offset + 1
        finally:
            await consumer.stop()
        return self._arrived


class LibrdkafkaMock(Kafka):
    """librdkafka's mock cluster: its broker goes down and comes back with its records, as one that was killed would."""

    unroutable: str | None = MISSING

    def __init__(self) -> None:
        self.cluster = MockCluster(self.topic, MISSING)
        super().__init__(self.cluster.bootstrap_servers)

    async def stop(self) -> None:
        self.cluster.down()

    async def start(self) -> None:
        self.cluster.up()

    async def freeze(self) -> None:
        self.cluster.answer_after(60_000)

    async def thaw(self) -> None:
        self.cluster.answer_after(0)


@pytest.fixture(params=["librdkafka-mock", "broker"])
def broker(request: pytest.FixtureRequest) -> Iterator[Kafka]:
    if request.param == "broker":
        if "KAFKA_BOOTSTRAP" not in os.environ:
            pytest.skip("KAFKA_BOOTSTRAP names no Kafka broker")
        kafka = Kafka(os.environ["KAFKA_BOOTSTRAP"])
        kafka.topic = f"contract-{uuid4()}"
        yield kafka
        return
    mock = LibrdkafkaMock()
    yield mock
    mock.cluster.close()


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.__name__)
async def test_the_contract(case: Case, broker: Kafka) -> None:
    await case(broker)


async def test_the_whole_way(broker: Kafka, pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    try:
        await check_the_whole_way(broker, pool, outbox)
    except SkipTest as reason:
        pytest.skip(str(reason))


@pytest.fixture
def mock() -> Iterator[LibrdkafkaMock]:
    mock = LibrdkafkaMock()
    yield mock
    mock.cluster.close()


class InTransactions(LibrdkafkaMock):
    """The same, each batch a transaction."""

    check_crcs = False  # the mock writes the end of a transaction without a checksum

    def destination(self, **settings: Any) -> AbstractAsyncContextManager[Dispatcher]:
        return super().destination(transactional_id="relay", **settings)


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.__name__)
async def test_the_contract_in_transactions(case: Case) -> None:
    mock = InTransactions()
    try:
        await case(mock)
    finally:
        mock.cluster.close()


async def test_a_key_goes_to_one_partition(mock: LibrdkafkaMock) -> None:
    batch = [Message(number, topic=mock.topic, key=f"key-{number % 7}") for number in range(100)]
    async with mock.destination() as destination:
        await destination.dispatch(*batch)
    consumer = AIOKafkaConsumer(mock.topic, bootstrap_servers=mock.bootstrap_servers, auto_offset_reset="earliest")
    places: dict[bytes, set[int]] = {}
    count = 0
    await consumer.start()
    try:
        for partition in consumer.assignment():
            consumer.seek(partition, 0)
        while count < len(batch):
            for partition, records in (await consumer.getmany(timeout_ms=100)).items():
                count += len(records)
                for record in records:
                    places.setdefault(record.key, set()).add(partition.partition)
    finally:
        await consumer.stop()
    assert len(places) == 7
    assert all(len(partitions) == 1 for partitions in places.values())
    assert len(set.union(*places.values())) > 1


async def test_an_outage_leaves_no_copies_behind_that_come_besides_those_of_the_relay(mock: LibrdkafkaMock) -> None:
    """An idempotent producer keeps what it has for ever: a batch tried ten times would arrive ten times."""
    batch = [Message(number, topic=mock.topic) for number in range(10)]
    async with mock.destination() as destination:
        await destination.dispatch(Message("before", topic=mock.topic))
        await mock.stop()
        for _ in range(3):
            with pytest.raises((PartialDispatchError, DestinationUnavailableError)):
                await destination.dispatch(*batch)
        await mock.start()
        while True:
            try:
                await destination.dispatch(*batch)
            except (PartialDispatchError, DestinationUnavailableError):
                continue
            break
        await destination.dispatch(Message("after", topic=mock.topic))
    assert len(await mock.received(12)) == 12


async def test_what_the_broker_refuses_by_the_batch_is_blamed_on_none_of_it(mock: LibrdkafkaMock) -> None:
    batch = [Message(number, topic=mock.topic, key="one partition") for number in range(10)]
    async with mock.destination() as destination:
        mock.cluster.refuse(MESSAGE_TOO_LARGE)
        with pytest.raises(PartialDispatchError) as caught:
            await destination.dispatch(*batch)
        assert set(caught.value.failures) == {message.id for message in batch}
        assert len(set(map(id, caught.value.failures.values()))) == 1
        assert all(isinstance(error, RejectedError) for error in caught.value.failures.values())
        await destination.dispatch(*batch)


async def test_in_a_transaction_what_the_broker_refuses_takes_all_the_others_along(mock: LibrdkafkaMock) -> None:
    batch = [Message(number, topic=mock.topic, key=f"key-{number}") for number in range(10)]
    async with mock.destination(transactional_id="relay") as destination:
        await destination.dispatch(Message("before", topic=mock.topic))
        mock.cluster.refuse(MESSAGE_TOO_LARGE)
        with pytest.raises(PartialDispatchError) as caught:
            await destination.dispatch(*batch)
        assert set(caught.value.failures) == {message.id for message in batch}
        await destination.dispatch(Message("after", topic=mock.topic))


async def test_a_producer_that_was_fenced_is_replaced(mock: LibrdkafkaMock) -> None:
    async with mock.destination() as destination:
        await destination.dispatch(Message(1, topic=mock.topic))
        mock.cluster.refuse(INVALID_PRODUCER_EPOCH)
        with pytest.raises(PartialDispatchError) as caught:
            await destination.dispatch(Message(2, topic=mock.topic))
        (error,) = caught.value.failures.values()
        assert isinstance(error, DestinationUnavailableError)
        await destination.dispatch(Message(3, topic=mock.topic))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"acks": 1}, "acks=1 would lose messages"),
        ({"acks": 0}, "acks=0 would lose messages"),
        ({"enable_idempotence": False}, "enable_idempotence cannot be set"),
        ({"value_serializer": str}, "value_serializer cannot be set"),
    ],
)
def test_a_setting_that_would_lose_messages_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        KafkaDispatcher("127.0.0.1:9092", **settings)
