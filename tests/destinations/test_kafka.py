"""Kafka: on librdkafka's mock cluster, which is no Kafka broker, and on a real one where KAFKA_BOOTSTRAP names it."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import SkipTest
from uuid import uuid4

import anyio
import anyio.lowlevel
import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import TopicAuthorizationFailedError

from outbox import (
    DestinationUnavailableError,
    Message,
    Outbox,
    PartialDispatchError,
    RejectedError,
)
from outbox.destinations.kafka import KafkaDispatcher, received
from outbox.testing import CONTRACT, Broker, Case
from tests.destinations.failures import failures_of
from tests.destinations.kafka_mock import (
    INVALID_PRODUCER_EPOCH,
    MESSAGE_TOO_LARGE,
    TOPIC_AUTHORIZATION_FAILED,
    MockCluster,
)
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

    def destination(self, **settings: Any) -> KafkaDispatcher:
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
async def broker(request: pytest.FixtureRequest) -> AsyncIterator[Kafka]:
    if request.param == "librdkafka-mock":
        mock = LibrdkafkaMock()
        yield mock
        mock.cluster.close()
        return
    if "KAFKA_BOOTSTRAP" not in os.environ:
        pytest.skip("KAFKA_BOOTSTRAP names no Kafka broker")
    kafka = Kafka(os.environ["KAFKA_BOOTSTRAP"])
    kafka.topic = f"contract-{uuid4()}"
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(kafka.topic, num_partitions=3, replication_factor=1)])
        yield kafka
        await admin.delete_topics([kafka.topic])
    finally:
        await admin.close()


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

    def destination(self, **settings: Any) -> KafkaDispatcher:
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
    places: dict[bytes, set[int]] = {}
    for record in await records(mock, 100):
        places.setdefault(record.key, set()).add(record.partition)
    assert len(places) == 7
    assert all(len(partitions) == 1 for partitions in places.values())
    assert len(set.union(*places.values())) > 1


async def test_every_part_goes_where_kafka_has_a_place_for_it(mock: LibrdkafkaMock) -> None:
    recorded_at = datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=UTC)
    message = Message({"a": 1}, topic=mock.topic, key="Grüße", headers={"traceparent": "00-ä"}, recorded_at=recorded_at)
    ancient = Message(1, topic=mock.topic, key="Grüße", recorded_at=datetime.min.replace(tzinfo=UTC))
    async with mock.destination() as destination:
        await destination.dispatch(message, ancient)
    first, second = await records(mock, 2)
    assert (first.topic, first.key, first.value) == (mock.topic, "Grüße".encode(), b'{"a":1}')
    assert first.timestamp == 1709251199123
    assert dict(first.headers) == {
        "traceparent": "00-ä".encode(),
        "outbox-id": str(message.id).encode(),
        "outbox-recorded-at": b"2024-02-29T23:59:59.123456+00:00",
    }
    assert second.timestamp == 0  # before 1970 Kafka has none
    assert received(second).recorded_at == ancient.recorded_at


async def test_what_others_add_on_the_way_is_left_out(mock: LibrdkafkaMock) -> None:
    message = Message(1, topic=mock.topic, headers={"a": "b"})
    async with mock.destination() as destination:
        await destination.dispatch(message)
    (record,) = await records(mock, 1)
    added = [("null", None), ("offset", bytes(7) + b"\x01"), ("binary", b"\xff"), ("text", "ä".encode())]
    assert received(with_headers(record, [*record.headers, *added])).headers == {"a": "b", "text": "ä"}


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


@pytest.mark.parametrize("kind", [LibrdkafkaMock, InTransactions])
async def test_a_broker_that_freezes_on_more_than_the_producer_holds_is_unavailable(kind: type[LibrdkafkaMock]) -> None:
    mock = kind()
    batch = [Message.from_body(b"x" * 10_000, topic=mock.topic, key="one partition") for _ in range(20)]
    try:
        async with mock.destination() as destination:
            await destination.dispatch(Message("before", topic=mock.topic))
            await mock.freeze()
            with anyio.fail_after(10):
                failures = await failures_of(destination, *batch)
            assert len(failures) == 20
            assert {type(error) for error in failures.values()} == {DestinationUnavailableError}
            await mock.thaw()
            await destination.dispatch(*batch)
    finally:
        mock.cluster.close()


@pytest.mark.parametrize("fault", [LibrdkafkaMock.stop, LibrdkafkaMock.freeze])
async def test_a_topic_that_is_new_while_no_broker_answers_is_not_taken_for_a_missing_one(
    mock: LibrdkafkaMock, fault: Callable[[LibrdkafkaMock], Any]
) -> None:
    """aiokafka says UnknownTopicOrPartitionError of both; an outage must not spend attempts."""
    async with mock.destination() as destination:
        await destination.dispatch(Message("before", topic=mock.topic))
        await fault(mock)
        failures = await failures_of(destination, Message(1, topic="new"), Message(2, topic="new"))
        assert {type(error) for error in failures.values()} == {DestinationUnavailableError}
        assert len(failures) == 2


async def test_partitions_without_a_leader_are_unavailable_until_they_have_one(mock: LibrdkafkaMock) -> None:
    batch = [Message(number, topic=mock.topic, key=f"key-{number}") for number in range(10)]
    async with mock.destination() as destination:
        mock.cluster.lead(mock.topic, None)
        failures = await failures_of(destination, *batch)
        assert {type(error) for error in failures.values()} == {DestinationUnavailableError}
        assert len(failures) == 10
        mock.cluster.lead(mock.topic, 1)
        await destination.dispatch(*batch)


async def test_what_may_not_be_written_is_a_failure_that_an_operator_may_mend(mock: LibrdkafkaMock) -> None:
    async with mock.destination() as destination:
        mock.cluster.refuse(TOPIC_AUTHORIZATION_FAILED)
        (error,) = (await failures_of(destination, Message(1, topic=mock.topic))).values()
        assert isinstance(error, TopicAuthorizationFailedError)
        await destination.dispatch(Message(2, topic=mock.topic))


async def test_a_batch_that_is_refused_disturbs_none_that_is_under_way(mock: LibrdkafkaMock) -> None:
    before, bad, *good = [Message(number, topic=mock.topic, key=f"key-{number}") for number in range(12)]
    async with mock.destination() as destination:
        await destination.dispatch(before)
        mock.cluster.refuse(MESSAGE_TOO_LARGE)
        refused = asyncio.create_task(failures_of(destination, bad))
        producer = destination._client  # noqa: SLF001 -- when the request is under way, nobody else says
        assert producer
        while not producer._sender._in_flight:  # noqa: SLF001 -- as above
            await anyio.lowlevel.checkpoint()
        await asyncio.gather(*(destination.dispatch(message) for message in good))
        assert set(await refused) == {bad.id}
    assert {message.id for message in await mock.received(11)} == {before.id, *(message.id for message in good)}


async def test_in_transactions_batches_that_wait_outlive_the_one_that_is_cancelled() -> None:
    mock = InTransactions()
    batches = [[Message(number, topic=mock.topic) for number in range(10)] for _ in range(4)]
    try:
        async with mock.destination() as destination:
            await destination.dispatch(Message("before", topic=mock.topic))
            mock.cluster.answer_after(20)
            first, *others = [asyncio.create_task(destination.dispatch(*batch)) for batch in batches]
            await anyio.lowlevel.checkpoint()
            first.cancel()
            await asyncio.gather(*others)
            assert first.cancelled()
    finally:
        mock.cluster.close()


async def test_a_producer_whose_sender_died_between_two_batches_is_replaced(mock: LibrdkafkaMock) -> None:
    async with mock.destination() as destination:
        await destination.dispatch(Message(1, topic=mock.topic))
        producer = destination._client  # noqa: SLF001 -- no mock can make it die while it is idle
        assert producer
        sender = producer._sender.sender_task  # noqa: SLF001 -- as above
        sender.cancel()
        await asyncio.wait([sender])
        await destination.dispatch(Message(2, topic=mock.topic))


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


def test_a_setting_that_there_is_not_is_refused_at_the_door() -> None:
    with pytest.raises(TypeError, match="compresion_type"):
        KafkaDispatcher("127.0.0.1:9092", compresion_type="gzip")


# --- helpers ------------------------------------------------------------------------------------------------


async def records(kafka: Kafka, count: int) -> list[ConsumerRecord[Any, Any]]:
    found: list[ConsumerRecord[Any, Any]] = []
    async with AIOKafkaConsumer(
        kafka.topic, bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest"
    ) as consumer:
        while len(found) < count:
            for some in (await consumer.getmany(timeout_ms=100)).values():
                found += some
    return found


def with_headers(record: ConsumerRecord[Any, Any], headers: Sequence[tuple[str, Any]]) -> ConsumerRecord[Any, Any]:
    return replace(record, headers=tuple(headers))
