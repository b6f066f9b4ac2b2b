"""FastStream's brokers, each on a real server, read by subscribers of its own."""

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import anyio
import asyncpg
import pytest
from faststream import Context, confluent, kafka
from faststream.message import StreamMessage
from faststream.nats import NatsBroker
from faststream.rabbit import Channel, RabbitBroker, RabbitQueue
from faststream.redis import RedisBroker, StreamSub
from nats.errors import ConnectionClosedError
from nats.js.api import ConsumerConfig, DeliverPolicy

from outbox import DestinationUnavailableError, Message, Outbox, PartialDispatchError, RejectedError
from outbox.destinations.faststream import FastStreamDispatcher, received
from outbox.testing import CONTRACT, Broker, Case
from tests.destinations.brokers import Process, ProcessBroker, free_port, listens, program
from tests.destinations.failures import failures_of
from tests.destinations.kafka_mock import MockCluster
from tests.destinations.nats_server import NatsServer
from tests.destinations.rabbitmq_server import MEGABYTE, RabbitMQServer
from tests.destinations.relaying import check_the_whole_way

Handler = Callable[..., Awaitable[None]]
TIMEOUT = timedelta(seconds=2)
SOON: Any = 0.05  # seconds, which these brokers declare as whole ones


async def whole(message: StreamMessage[Any]) -> StreamMessage[Any]:
    """Decodes nothing, so that a handler gets the message."""
    return message


PLAIN: Any = {"decoder": whole, "apply_types": False, "logger": None}


@dataclass
class Order:
    order: int


class Subscribed(Broker):
    """Reads with a subscriber of FastStream."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.topic = f"orders.{uuid4().hex}"
        self.last: Any = None
        self.last_correlation_id = ""
        self._arrived: list[Message] = []
        self._news = asyncio.Event()

    @abstractmethod
    def broker(self, **options: Any) -> Any:
        """Returns a new broker of FastStream."""

    @abstractmethod
    def subscribe(self, broker: Any, handle: Handler) -> None:
        """Subscribes a handler, from where the one before ended."""

    def destination(self) -> AbstractAsyncContextManager[FastStreamDispatcher]:
        return self._destination()

    @asynccontextmanager
    async def _destination(self) -> AsyncIterator[FastStreamDispatcher]:
        broker = self.broker()
        try:
            # Bodies of the contract are any bytes; as JSON its subscribers would decode them, or refuse.
            yield FastStreamDispatcher(broker, content_type="application/octet-stream", timeout=TIMEOUT, **self.options)
        finally:
            await broker.stop()

    async def received(self, count: int) -> Sequence[Message]:
        broker = self.broker()
        self.subscribe(broker, self.arrive)
        await broker.start()
        try:
            while len(self._arrived) < count:
                self._news.clear()
                await self._news.wait()
        finally:
            await broker.stop()
        return self._arrived

    async def arrive(self, message: StreamMessage[Any]) -> None:
        self._arrived.append(received(message))
        self.last = message.raw_message
        self.last_correlation_id = message.correlation_id
        self._news.set()


class Rabbit(ProcessBroker, Subscribed):
    too_large: int | None = MEGABYTE + 1
    unroutable: str | None = "nobody.is.bound.to.this"

    def __init__(self, server: RabbitMQServer) -> None:
        super().__init__(max_body=MEGABYTE)
        self.process = self.server = server
        self.topic = server.queue()
        self.queue = RabbitQueue(self.topic, durable=True)

    def broker(self, **options: Any) -> RabbitBroker:
        return RabbitBroker(self.server.url, reconnect_interval=SOON, **PLAIN | options)

    def subscribe(self, broker: RabbitBroker, handle: Handler) -> None:
        broker.subscriber(self.queue)(handle)


class Nats(ProcessBroker, Subscribed):
    too_large: int | None = 1024 * 1024 + 1
    unroutable: str | None = "nobody.stores.this"

    def __init__(self, folder: Path) -> None:
        super().__init__(stream="ORDERS")
        self.process = self.server = NatsServer(folder)

    def broker(self, **options: Any) -> NatsBroker:
        settings = {"max_reconnect_attempts": -1, "reconnect_time_wait": SOON}
        return NatsBroker(self.server.url, **settings | PLAIN | options)

    def subscribe(self, broker: NatsBroker, handle: Handler) -> None:
        start = self.last.metadata.sequence.stream + 1 if self.last else 1
        config = ConsumerConfig(deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=start)
        broker.subscriber(self.topic, stream="ORDERS", config=config)(handle)


class Redis(ProcessBroker, Subscribed):
    too_large: int | None = MEGABYTE + 1
    unroutable: str | None = "not-a-stream"

    def __init__(self, folder: Path) -> None:
        super().__init__(max_body=MEGABYTE)
        self.port = free_port()
        settings = {"bind": "127.0.0.1", "port": self.port, "dir": folder, "appendonly": "yes", "save": ""}
        durable = {**settings, "appendfsync": "always"}
        command = [
            program("redis-server"),
            *(str(part) for name, one in durable.items() for part in (f"--{name}", one)),
        ]
        self.process = Process(command, partial(listens, self.port))

    def broker(self, **options: Any) -> RedisBroker:
        return RedisBroker(f"redis://127.0.0.1:{self.port}", **PLAIN | options)

    def subscribe(self, broker: RedisBroker, handle: Handler) -> None:
        start = self.last["message_ids"][-1].decode() if self.last else "0"
        broker.subscriber(stream=StreamSub(self.topic, last_id=start, max_records=1_000))(handle)


@pytest.fixture
def rabbit(rabbitmq: RabbitMQServer) -> Rabbit:
    return Rabbit(rabbitmq)


@pytest.fixture
async def jetstream(tmp_path: Path) -> AsyncIterator[Nats]:
    broker = Nats(tmp_path)
    async with broker.server.running():
        yield broker


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[Redis]:
    redis = Redis(tmp_path)
    await redis.start()
    try:
        client = await (broker := redis.broker()).connect()
        await client.set("not-a-stream", "a string")
        await broker.stop()
        yield redis
    finally:
        await redis.stop()


@pytest.fixture(params=["rabbit", "jetstream", "redis"])
def contract(request: pytest.FixtureRequest) -> Subscribed:
    contract = request.getfixturevalue(request.param)
    assert isinstance(contract, Subscribed)
    return contract


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.__name__)
async def test_the_contract_on_rabbitmq(case: Case, rabbit: Rabbit) -> None:
    await case(rabbit)


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.__name__)
async def test_the_contract_on_nats(case: Case, jetstream: Nats) -> None:
    await case(jetstream)


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.__name__)
async def test_the_contract_on_redis(case: Case, redis: Redis) -> None:
    await case(redis)


async def test_the_whole_way(jetstream: Nats, pool: "asyncpg.Pool[Any]", outbox: Outbox) -> None:
    await check_the_whole_way(jetstream, pool, outbox)


async def test_a_subscriber_reads_it_as_one_of_its_own(contract: Subscribed) -> None:
    message = Message({"order": 1}, topic=contract.topic, key="order-1", headers={"type": "placed", "note": "ü"})
    broker = contract.broker(decoder=None, apply_types=True)
    got: asyncio.Future[tuple[Order, StreamMessage[Any]]] = asyncio.get_running_loop().create_future()

    async def handle(order: Order, message: Annotated[StreamMessage[Any], Context("message")]) -> None:
        got.set_result((order, message))

    contract.subscribe(broker, handle)
    await broker.start()
    try:
        await FastStreamDispatcher(broker, **contract.options).dispatch(message)
        with anyio.fail_after(10):
            order, raw = await got
    finally:
        await broker.stop()
    assert order == Order(order=1)
    assert (raw.content_type, raw.correlation_id, raw.message_id) == (
        "application/json",
        str(message.id),
        str(message.id),
    )
    assert raw.headers["type"] == "placed"
    assert received(raw).headers == message.headers
    assert received(raw).key == "order-1"


async def test_headers_of_the_message_that_faststream_has_a_use_for_stay_as_they_are(contract: Subscribed) -> None:
    headers = {"correlation_id": "of the request", "content-type": "application/octet-stream", "message_id": "mine"}
    message = Message(1, topic=contract.topic, headers=headers)
    async with contract.destination() as destination:
        await destination.dispatch(message)
    (arrived,) = await contract.received(1)
    assert arrived.headers == headers
    assert contract.last_correlation_id == "of the request"


@pytest.mark.parametrize(
    "client",
    [kafka.KafkaBroker, partial(confluent.KafkaBroker, allow_auto_create_topics=False)],  # a mock cannot create them
    ids=["aiokafka", "confluent"],
)
async def test_both_clients_of_kafka_keep_what_they_are_given(client: Any) -> None:
    cluster = MockCluster("orders", "missing")
    broker = client(cluster.bootstrap_servers, **PLAIN)
    arrived: list[Message] = []
    all_there = asyncio.Event()

    async def arrive(message: StreamMessage[Any]) -> None:
        arrived.append(received(message))
        if {message.id for message in batch} <= {message.id for message in arrived}:
            all_there.set()

    batch = [Message(number, topic="orders", key=f"key-{number % 5}", headers={"ü": "é"}) for number in range(200)]
    huge = Message.from_body(b"x" * 2_000_000, topic="orders")
    broker.subscriber("orders", group_id="all", auto_offset_reset="earliest")(arrive)
    destination = FastStreamDispatcher(broker, timeout=TIMEOUT)
    try:
        failures = await failures_of(destination, *batch[:100], huge, *batch[100:])
        assert {name: type(error) for name, error in failures.items()} == {huge.id: RejectedError}
        await broker.start()
        with anyio.fail_after(30):
            await all_there.wait()
    finally:
        await broker.stop()
        cluster.close()
    for key in {message.key for message in batch}:
        in_order = dict.fromkeys(message.id for message in arrived if message.key == key)
        assert list(in_order) == [message.id for message in batch if message.key == key]
    assert {(message.headers["ü"], message.topic) for message in arrived} == {("é", "orders")}


# FastStream forgets the producer that could not start without closing it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_kafka_that_nobody_runs_is_unavailable() -> None:
    destination = FastStreamDispatcher(kafka.KafkaBroker(f"127.0.0.1:{free_port()}", **PLAIN), timeout=TIMEOUT)
    for _ in range(2):
        with pytest.raises(DestinationUnavailableError):
            await destination.dispatch(Message(1, topic="orders"))


async def test_of_a_message_that_is_sent_twice_jetstream_keeps_one(jetstream: Nats) -> None:
    twice, last = Message(1, topic=jetstream.topic), Message(2, topic=jetstream.topic)
    async with jetstream.destination() as destination:
        for message in (twice, twice, last):
            await destination.dispatch(message)
    assert [message.id for message in await jetstream.received(2)] == [twice.id, last.id]


async def test_a_client_of_nats_that_gave_up_says_that_it_is_closed_for_good(jetstream: Nats) -> None:
    gone = asyncio.Event()

    async def closed() -> None:
        gone.set()

    broker = jetstream.broker(max_reconnect_attempts=1, closed_cb=closed)
    destination = FastStreamDispatcher(broker, timeout=TIMEOUT, **jetstream.options)
    message = Message(1, topic=jetstream.topic)
    try:
        await destination.dispatch(message)
        await jetstream.stop()
        with anyio.fail_after(10):
            await gone.wait()
        await jetstream.start()
        for _ in range(2):
            with pytest.raises(DestinationUnavailableError, match="closed for good: start this process anew"):
                await destination.dispatch(message)
    finally:
        with suppress(ConnectionClosedError):  # which is what was tried
            await broker.stop()


async def test_what_rabbitmq_closes_the_channel_over_is_one_rejection_that_blames_nobody(rabbit: Rabbit) -> None:
    rabbit.options = {}
    huge = Message.from_body(b"x" * (MEGABYTE + 1), topic=rabbit.topic)
    good = [Message(number, topic=rabbit.topic) for number in range(10)]
    async with rabbit.destination() as destination:
        with pytest.raises(PartialDispatchError) as caught:
            await destination.dispatch(*good, huge)
        failures = caught.value.failures
        rejections = [
            failures[message.id] for message in (*good, huge) if isinstance(failures.get(message.id), RejectedError)
        ]
        assert failures[huge.id] in rejections
        assert len(set(map(id, rejections))) == 1
        with anyio.fail_after(10):
            while unavailable := await failures_of(destination, *good):  # until the client has opened another channel
                assert {type(error) for error in unavailable.values()} == {DestinationUnavailableError}
    assert {message.id for message in good} <= {message.id for message in await rabbit.received(10)}


async def test_a_channel_that_confirms_nothing_accepts_nothing(rabbit: Rabbit) -> None:
    broker = rabbit.broker(default_channel=Channel(publisher_confirms=False))
    try:
        with pytest.raises(PartialDispatchError, match="publisher_confirms=True"):
            await FastStreamDispatcher(broker).dispatch(Message(1, topic=rabbit.topic))
    finally:
        await broker.stop()


@pytest.mark.parametrize(
    ("broker", "options", "reason"),
    [
        (NatsBroker(), {}, "name the stream"),
        (NatsBroker(), {"exchange": "orders"}, "no argument 'exchange'"),
        (RabbitBroker(), {"stream": "ORDERS"}, "no argument 'stream'"),
        (NatsBroker, {}, "no broker of FastStream"),
        (object(), {}, "no broker of FastStream"),
    ],
)
def test_what_would_lose_messages_or_cannot_publish_is_refused(
    broker: Any, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        FastStreamDispatcher(broker, **options)
