"""A service that writes and reads messages, as its author types it; mypy checks it, nobody runs it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type
from uuid import UUID, uuid4

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from outbox import (
    ChainDispatcher,
    Codec,
    Counts,
    DeadLetter,
    Dispatcher,
    FilteringDispatcher,
    HandlerDispatcher,
    JsonCodec,
    Message,
    Outbox,
    OutboxDispatcher,
    PartialDispatchError,
    TranslatingDispatcher,
)


@dataclass(frozen=True)
class OrderPlaced:
    order: int


def a_message_has_these_types() -> None:
    message = Message(OrderPlaced(1), topic="orders", key="order-1", headers={"a": "b"}, id=uuid4())
    assert_type(message, Message)
    assert_type(message.id, UUID)
    assert_type(message.topic, str)
    assert_type(message.key, str | None)
    assert_type(message.headers, Mapping[str, str])
    assert_type(message.payload, Any)
    assert_type(message.body, bytes)
    assert_type(message.recorded_at, datetime | None)
    assert_type(message.due_at, datetime | None)
    assert_type(message.position, int | None)
    assert_type(message.attempts, int)
    assert_type(message.with_header("c", "d"), Message)
    assert_type(message.with_headers({"c": "d"}), Message)
    Message(None, topic="t", recorded_at=datetime.now(UTC), due_at=datetime.now(UTC) + timedelta(hours=1))


def a_message_refuses_these() -> None:
    Message(1)  # type: ignore[call-arg]  # no topic
    Message(1, "orders")  # type: ignore[call-arg]  # all but the payload is given by name
    Message(1, topic=None)  # type: ignore[arg-type]
    Message(1, topic="t", key=5)  # type: ignore[arg-type]
    Message(1, topic="t", headers={"a": 1})  # type: ignore[dict-item]
    Message(1, topic="t", id="018f")  # type: ignore[arg-type]
    message = Message(1, topic="t")
    message.topic = "u"  # type: ignore[misc]  # immutable
    message.headers["a"] = "b"  # type: ignore[index]  # read-only


class Subclass(Message):
    """A copy of it is one, too."""


def a_copy_is_of_the_same_type(message: Subclass) -> None:
    assert_type(message.with_header("a", "b"), Subclass)
    assert_type(message.with_headers({"a": "b"}), Subclass)


def an_outbox_is_made_of_these(codec: Codec) -> None:
    assert_type(Outbox(), Outbox)
    assert_type(Outbox("mail", schema="messaging", codec=codec, clock=lambda: datetime.now(UTC)), Outbox)
    Outbox(codec=JsonCodec(types={"orders.placed": OrderPlaced}, upcasters={"orders.placed": dict}, options=1))
    assert_type(Outbox().schema_sql(), str)
    Outbox("mail", "messaging")  # type: ignore[call-arg]  # settings are given by name
    Outbox(clock=lambda: 1.5)  # type: ignore[arg-type, return-value]


async def every_verb_takes_a_connection_of_either_kind(
    plain: asyncpg.Connection[Any], pooled: PoolConnectionProxy[Any], outbox: Outbox, messages: list[Message]
) -> None:
    for connection in (plain, pooled):
        assert_type(await outbox.migrate(connection), int)
        await outbox.check(connection)
        await outbox.persist(connection, *messages)
        assert_type(await outbox.retrieve(connection, 100), list[Message])
        await outbox.mark_dispatched(connection, *messages)
        await outbox.remove(connection, *messages)
        await outbox.clear(connection)
        assert_type(await outbox.cleanup(connection, timedelta(days=1), 1000), int)
        assert_type(await outbox.counts(connection), Counts)
        assert_type(await outbox.dead_letters(connection), list[DeadLetter])
        assert_type(await outbox.dead_letters(connection, [uuid4()], limit=5), list[DeadLetter])
        assert_type(await outbox.redrive(connection, [uuid4()]), int)
        assert_type(await outbox.discard(connection, [uuid4()]), int)
    await outbox.persist(plain, messages)  # type: ignore[arg-type]  # a star is missing
    await outbox.redrive(plain, "018f")  # type: ignore[arg-type]
    await outbox.cleanup(plain, 3600, 10)  # type: ignore[arg-type]  # a duration says its unit


def counts_and_dead_letters_are_values(counts: Counts, letter: DeadLetter) -> None:
    assert_type(counts.total + counts.dispatched + counts.pending + counts.waiting + counts.dead, int)
    assert_type(letter.message, Message)
    assert_type(letter.attempts, int)
    assert_type(letter.error, str)
    assert_type(letter.died_at, datetime)
    counts.total = 1  # type: ignore[misc]  # frozen
    letter.error = ""  # type: ignore[misc]  # frozen


async def a_request(pool: "asyncpg.Pool[Any]", outbox: Outbox) -> None:
    async with pool.acquire() as connection, connection.transaction():
        dispatcher = OutboxDispatcher(connection, outbox, decorators=[lambda message: message.with_header("a", "b")])
        await dispatcher.dispatch(Message(OrderPlaced(1), topic="orders"), Message(2, topic="orders"))
        await dispatcher.dispatch()
        await dispatcher.dispatch([Message(1, topic="t")])  # type: ignore[arg-type]  # a star is missing


class OrderService:
    """Domain code holds a dispatcher and does not know what is behind it."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def place(self, order: int) -> None:
        await self._dispatcher.dispatch(Message(OrderPlaced(order), topic="orders"))


class Printing:
    """A destination of one's own is a class with one method; it inherits from nothing."""

    async def dispatch(self, *messages: Message) -> None:
        print(*messages)


class TakesAList:
    async def dispatch(self, messages: list[Message]) -> None: ...


class IsNotAsync:
    def dispatch(self, *messages: Message) -> None: ...


async def handle(message: Message) -> int:
    return message.attempts


def not_async(_: Message) -> None: ...


def what_is_a_dispatcher(connection: asyncpg.Connection[Any]) -> None:
    inner: Dispatcher = Printing()
    every: list[Dispatcher] = [
        OutboxDispatcher(connection),
        ChainDispatcher(inner, Printing()),
        FilteringDispatcher(lambda message: message.topic == "orders", inner),
        TranslatingDispatcher(lambda message: Message(1, topic=message.topic), inner),
        HandlerDispatcher(handle),
    ]
    OrderService(every[0])
    OrderService(TakesAList())  # type: ignore[arg-type]
    OrderService(IsNotAsync())  # type: ignore[arg-type]
    HandlerDispatcher(not_async)  # type: ignore[arg-type]
    FilteringDispatcher(lambda message: message.topic, inner)  # type: ignore[arg-type, return-value]
    TranslatingDispatcher(lambda _: None, inner)  # type: ignore[arg-type, return-value]


def what_failed_is_named_by_id(message: Message, error: BaseException) -> None:
    partial = PartialDispatchError({message.id: error})
    assert_type(partial.failures, dict[UUID, BaseException])
    PartialDispatchError([message.id])  # type: ignore[arg-type]
    PartialDispatchError({str(message.id): error})  # type: ignore[dict-item]


class TextCodec:
    """A codec of one's own inherits from nothing either."""

    def encode(self, payload: Any) -> tuple[str | None, bytes]:
        return None, str(payload).encode()

    def decode(self, body: bytes, type_name: str | None) -> Any:
        return body.decode(), type_name


class HalfACodec:
    def encode(self, payload: Any) -> tuple[str | None, bytes]:
        return None, bytes(payload)


def what_is_a_codec() -> None:
    Outbox(codec=TextCodec())
    Outbox(codec=HalfACodec())  # type: ignore[arg-type]
    name, body = JsonCodec().encode(1)
    assert_type(name, str | None)
    assert_type(body, bytes)
