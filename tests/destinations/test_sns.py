"""Amazon SNS with a queue that is subscribed, both emulated by the server of moto: see `aws.py`."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import SkipTest
from uuid import uuid4

import asyncpg
import pytest

from outbox import Message, Outbox
from outbox.destinations.sns import SnsDispatcher, received
from outbox.testing import CONTRACT, Case
from tests.destinations.aws import (
    AwsBroker,
    Emulator,
    Way,
    emulator,
    new_queue,
    reading,
    run,
)
from tests.destinations.relaying import check_the_whole_way


class Sns(AwsBroker):
    topic = "orders"
    too_large: int | None = 256 * 1024 + 1
    unroutable: str | None = "nobody"
    arn: str

    def destination(self) -> AbstractAsyncContextManager[SnsDispatcher]:
        return nullcontext(SnsDispatcher(self.client, self.where, timeout=timedelta(seconds=2)))

    def where(self, message: Message) -> str:
        return self.arn.replace(":topic-", ":nobody-") if message.topic == self.unroutable else self.arn

    def message(self, raw: Mapping[str, Any]) -> Message:
        return received(raw)


@pytest.fixture(scope="module")
def aws() -> Iterator[Emulator]:
    with emulator() as running:
        yield running


@asynccontextmanager
async def topic(aws: Emulator, kind: str, *, raw: bool = True) -> AsyncIterator[Sns]:
    """Makes a topic with a queue."""
    name = f"{uuid4().hex}{kind}"
    async with (
        Way(aws.port) as way,
        aws.client("sqs") as reader,
        aws.client("sns") as owner,
        aws.client("sns", way.port) as client,
    ):
        broker = Sns(aws, way, client, await new_queue(reader, name))
        attributes = {"FifoTopic": "true"} if kind else {}
        broker.arn = (await owner.create_topic(Name=f"topic-{name}", Attributes=attributes))["TopicArn"]
        await owner.subscribe(
            TopicArn=broker.arn,
            Protocol="sqs",
            Endpoint=f"arn:aws:sqs:eu-central-1:123456789012:{name}",
            Attributes={"RawMessageDelivery": str(raw).lower()},
        )
        async with reading(broker, reader):
            yield broker


@pytest.fixture
async def fifo(aws: Emulator) -> AsyncIterator[Sns]:
    async with topic(aws, ".fifo") as broker:
        yield broker


@pytest.fixture
async def standard(aws: Emulator) -> AsyncIterator[Sns]:
    async with topic(aws, "") as broker:
        yield broker


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.__name__)
async def test_the_contract_with_a_fifo_topic(case: Case, fifo: Sns) -> None:
    await run(case, fifo)


@pytest.mark.parametrize("case", CONTRACT[:5], ids=lambda case: case.__name__)
async def test_what_arrives_through_a_standard_topic(case: Case, standard: Sns) -> None:
    if "in_its_order" in case.__name__:
        raise SkipTest("a standard topic keeps no order")
    await run(case, standard)


async def test_the_whole_way(standard: Sns, pool: "asyncpg.Pool[Any]", outbox: Outbox) -> None:
    await check_the_whole_way(standard, pool, outbox, count=1_000)


async def test_a_message_in_the_envelope_of_sns_is_received(aws: Emulator) -> None:
    message = Message.from_body(
        b"\0\xff",
        topic="orders",
        key="Grüße",
        headers={"traceparent": "00-1-2-01", "odd": "\r\n"},
        recorded_at=datetime(2024, 2, 29, tzinfo=UTC),
    )
    async with topic(aws, "", raw=False) as broker:
        async with broker.destination() as destination:
            await destination.dispatch(message)
        await broker.received(1)
        (raw,) = broker.raws
    notification = json.loads(raw["Body"])
    assert notification["Type"] == "Notification"
    assert notification["MessageAttributes"]["traceparent"] == {"Type": "String", "Value": "00-1-2-01"}
    for arrived in (received(raw), received(notification), received({"body": raw["Body"]})):
        assert (arrived.id, arrived.topic, arrived.key) == (message.id, "orders", "Grüße")
        assert (arrived.headers, arrived.body, arrived.recorded_at) == (
            message.headers,
            message.body,
            message.recorded_at,
        )


@pytest.mark.parametrize(
    "raw", [{}, {"Body": "[]"}, {"Body": "{"}, {"Message": "1"}, {"Body": "1", "MessageAttributes": {}}]
)
def test_what_somebody_else_sent_is_a_value_error(raw: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="was not sent by asyncpg-outbox"):
        received(raw)
