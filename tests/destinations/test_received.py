"""What another sent is not taken for a message, wherever it came from."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from aiokafka import ConsumerRecord
from faststream.message import StreamMessage
from nats.aio.msg import Msg

from outbox import Message
from outbox.destinations import faststream, kafka, nats, rabbitmq, redis, sns, sqs, webhook

NONE = b"\xff"  # in no text
AN_ID = "01900000-0000-7000-8000-000000000000"
TAKEN: Any = None  # what reading does not look at

Foreign = Callable[[dict[str, str]], Message]
"""Receives what another sent, with an id and a topic as this library would name them, or without."""


def from_faststream(own: dict[str, str]) -> Message:
    return faststream.received(StreamMessage({}, b"{}", headers={"x-delivery-count": 3, **own}))


def from_kafka(own: dict[str, str]) -> Message:
    headers = [("binary", NONE), *((name, text.encode()) for name, text in own.items())]
    return kafka.received(ConsumerRecord("orders", 0, 0, 0, 0, None, b"{}", TAKEN, 0, 0, headers))


def from_nats(own: dict[str, str]) -> Message:
    headers = {"Nats-Msg-Id": own["outbox-id"]} if "outbox-id" in own else None
    return nats.received(Msg(TAKEN, subject="orders", data=b"{}", headers=headers))


def from_rabbitmq(own: dict[str, str]) -> Message:
    raw: Any = SimpleNamespace(body=b"{}", headers={}, message_id=own.get("outbox-id"), routing_key="orders")
    return rabbitmq.received(raw)


def from_redis(own: dict[str, str]) -> Message:
    return redis.received("orders", {name.encode(): text.encode() for name, text in own.items()})


def attributes(own: dict[str, str]) -> dict[str, Any]:
    return {"MessageAttributes": {name: {"StringValue": text} for name, text in own.items()}}


def from_sqs(own: dict[str, str]) -> Message:
    return sqs.received({"Body": "{}", **attributes(own)})


def from_sns(own: dict[str, str]) -> Message:
    return sns.received({"Body": "no JSON", **attributes(own)})


def from_webhook(own: dict[str, str]) -> Message:
    return webhook.received({"ce-type": "orders", "ce-id": own.get("outbox-id", "")}, b"{}")


WAYS: tuple[Foreign, ...] = (
    from_faststream,
    from_kafka,
    from_nats,
    from_rabbitmq,
    from_redis,
    from_sqs,
    from_sns,
    from_webhook,
)


@pytest.mark.parametrize("received", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", [None, "42", "of the order"])
def test_what_another_sent_is_told_to_be_another_s(received: Foreign, name: str | None) -> None:
    own = {} if name is None else {"outbox-id": name, "outbox-topic": "orders"}
    with pytest.raises(ValueError, match=r"^this was not sent by asyncpg-outbox: (?!this was)"):
        received(own)


@pytest.mark.parametrize("received", WAYS, ids=lambda way: way.__name__)
def test_with_an_id_and_a_topic_it_is_a_message(received: Foreign) -> None:
    assert received({"outbox-id": AN_ID, "outbox-topic": "orders"}).id == UUID(AN_ID)


def test_a_key_of_kafka_that_is_no_text_is_another_s() -> None:
    with pytest.raises(ValueError, match="this was not sent by asyncpg-outbox: 'utf-8' codec can't decode"):
        kafka.received(ConsumerRecord("orders", 0, 0, 0, 0, NONE, b"{}", TAKEN, 0, 0, []))


def test_a_field_of_redis_that_is_no_text_is_another_s() -> None:
    with pytest.raises(ValueError, match="this was not sent by asyncpg-outbox: 'utf-8' codec can't decode"):
        redis.received("orders", {b"picture": NONE})
