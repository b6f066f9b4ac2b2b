"""Writing, as EventSauce's outbox dispatcher does it: in the caller's transaction, or not at all."""

import asyncio
from contextlib import suppress
from datetime import UTC, datetime
from uuid import UUID

import asyncpg
import orjson
import pytest

from outbox import (
    ChainDispatcher,
    CodecError,
    Dispatcher,
    FilteringDispatcher,
    HandlerDispatcher,
    JsonCodec,
    Message,
    NotInTransactionError,
    Outbox,
    OutboxDispatcher,
    OutboxError,
    SchemaError,
    TranslatingDispatcher,
)
from outbox.testing import CollectingDispatcher, FailingDispatcher, assert_dispatched, drain
from tests.conformance.support import numbered, numbers, orders, statements, write

NOON = datetime(2024, 2, 29, 12, tzinfo=UTC)
TEN = datetime(2024, 2, 29, 10, tzinfo=UTC)


class Regret(Exception):  # noqa: N818 -- no error: the reason for a rollback on purpose
    pass


async def place_order(connection: asyncpg.Connection, dispatcher: Dispatcher, number: int) -> None:
    """Domain code: a row and a message, and no idea of what is behind the dispatcher."""
    await connection.execute("INSERT INTO orders VALUES ($1)", number)
    await dispatcher.dispatch(Message({"number": number}, topic="orders.placed"))


async def place_orders(connection: asyncpg.Connection, outbox: Outbox, *numbers: int) -> None:
    """Several orders in one transaction."""
    async with connection.transaction():
        for number in numbers:
            await place_order(connection, OutboxDispatcher(connection, outbox), number)


# Capabilities


async def test_a_dispatcher_is_built_from_connection_clock_serializer_table_name_and_json_options(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    codec = JsonCodec(options=orjson.OPT_SORT_KEYS)
    mine = Outbox('my "own" outbox', schema=outbox.schema, codec=codec, clock=lambda: NOON)
    await mine.migrate(connection)
    async with connection.transaction():
        await OutboxDispatcher(connection, mine).dispatch(Message({"b": 1, "a": 2}, topic="letters"))
    row = await connection.fetchrow('SELECT recorded_at, payload FROM "my ""own"" outbox"')
    assert row is not None
    assert tuple(row) == (NOON, b'{"a":2,"b":1}')
    assert (await outbox.counts(connection)).total == 0


async def test_any_object_with_encode_and_decode_is_a_serializer(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    class Latin:
        def encode(self, payload: str) -> tuple[str | None, bytes]:
            return "text", payload.encode("latin-1")

        def decode(self, body: bytes, type_name: str | None) -> str:
            assert type_name == "text"
            return body.decode("latin-1")

    mine = Outbox(schema=outbox.schema, codec=Latin())
    await mine.persist(connection, Message("naïve", topic="words"))
    assert await connection.fetchval("SELECT payload FROM outbox") == b"na\xefve"
    assert_dispatched(await mine.retrieve(connection, 10), ("words", "naïve"))


async def test_it_can_be_used_like_any_other_dispatcher(connection: asyncpg.Connection, outbox: Outbox) -> None:
    collecting = CollectingDispatcher()
    async with connection.transaction():
        writing = OutboxDispatcher(connection, outbox)
        for number, dispatcher in enumerate([writing, collecting, ChainDispatcher(writing, collecting)]):
            assert isinstance(dispatcher, Dispatcher)
            await place_order(connection, dispatcher, number)
    assert numbers(await outbox.retrieve(connection, 10)) == [0, 2]
    assert numbers(collecting.messages) == [1, 2]


async def test_every_destination_is_a_dispatcher_too(connection: asyncpg.Connection) -> None:
    async def handle(_: Message) -> None:
        raise NotImplementedError

    inner = CollectingDispatcher()
    for dispatcher in [
        OutboxDispatcher(connection),
        HandlerDispatcher(handle),
        ChainDispatcher(inner),
        FilteringDispatcher(lambda _: True, inner),
        TranslatingDispatcher(lambda message: message, inner),
        FailingDispatcher([], inner),
    ]:
        assert isinstance(dispatcher, Dispatcher)


@pytest.mark.parametrize("count", [1, 2, 500])
async def test_dispatching_is_one_insert(connection: asyncpg.Connection, outbox: Outbox, count: int) -> None:
    async with connection.transaction():
        with statements(connection) as sent:
            await OutboxDispatcher(connection, outbox).dispatch(*numbered(count))
            await asyncio.sleep(0)
    assert len(sent) == 1
    assert sent[0].split()[:2] == ["INSERT", "INTO"]
    assert numbers(await outbox.retrieve(connection, 1_000)) == list(range(1, count + 1))


async def test_twelve_thousand_messages_go_in_one_call_and_in_order(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    async with connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(*numbered(12_000))
    assert numbers(await outbox.retrieve(connection, 20_000)) == list(range(1, 12_001))


async def test_the_id_is_the_given_one_else_a_new_one_and_stays_on_the_message(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    given = UUID("0190163d-8694-739b-aea5-966c26f8ad91")
    messages = [Message("a", topic="letters", id=given), Message("b", topic="letters"), Message("c", topic="letters")]
    await outbox.persist(connection, *messages)
    stored = await outbox.retrieve(connection, 10)
    assert [message.id for message in stored] == [message.id for message in messages]
    assert stored[0].id == given
    assert len({message.id for message in stored}) == 3
    assert stored[1].id.version == 7


async def test_the_time_of_recording_is_the_given_one_else_that_of_the_clock(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    mine = Outbox(schema=outbox.schema, clock=lambda: NOON)
    await mine.persist(connection, Message("given", topic="times", recorded_at=TEN), Message("clock", topic="times"))
    await mine.persist(connection, Message("clock", topic="times"))
    assert [message.recorded_at for message in await mine.retrieve(connection, 10)] == [TEN, NOON, NOON]


async def test_without_a_clock_the_time_of_recording_is_that_of_the_database(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    before = await connection.fetchval("SELECT clock_timestamp()")
    await outbox.persist(connection, *numbered(1))
    await outbox.persist(connection, *numbered(2))
    after = await connection.fetchval("SELECT clock_timestamp()")
    times = [message.recorded_at for message in await outbox.retrieve(connection, 10)]
    assert all(time is not None and before < time < after for time in times)


async def test_decorators_give_default_headers_before_a_message_is_written(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    def from_shop(message: Message) -> Message:
        return message.with_headers({"source": "shop", **message.headers})

    def traced(message: Message) -> Message:
        return message.with_header("trace", f"{message.headers['source']}-1")

    messages = [Message(1, topic="t"), Message(2, topic="t", headers={"source": "till"})]
    async with connection.transaction():
        await OutboxDispatcher(connection, outbox, decorators=[from_shop, traced]).dispatch(*messages)
    assert_dispatched(
        await outbox.retrieve(connection, 10),
        Message(1, topic="t", headers={"source": "shop", "trace": "shop-1"}),
        Message(2, topic="t", headers={"source": "till", "trace": "till-1"}),
    )
    assert messages[0].headers == {}, "the caller's message is left as it was"


async def test_chain_filter_and_translation_stand_before_an_outbox(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    def in_public_words(message: Message) -> Message:
        return Message({"order": message.payload["number"]}, topic="public.orders", id=message.id)

    async with connection.transaction():
        writing = OutboxDispatcher(connection, outbox)
        public = FilteringDispatcher(
            lambda message: message.payload["number"] % 2 == 0, TranslatingDispatcher(in_public_words, writing)
        )
        await ChainDispatcher(writing, public).dispatch(*numbered(2))
    assert_dispatched(
        await outbox.retrieve(connection, 10),
        ("numbers", {"number": 1}),
        ("numbers", {"number": 2}),
        ("public.orders", {"order": 2}),
    )


async def test_filter_and_translation_stand_before_a_destination(pool: asyncpg.Pool, outbox: Outbox) -> None:
    def in_their_words(message: Message) -> Message:
        return Message(f"no. {message.payload['number']}", topic="theirs", id=message.id)

    inner = CollectingDispatcher()
    destination = FilteringDispatcher(
        lambda message: message.payload["number"] != 2, TranslatingDispatcher(in_their_words, inner)
    )
    await write(pool, outbox, *numbered(3))
    assert len(await drain(outbox, pool, destination)) == 3, "what is filtered out counts as delivered"
    assert_dispatched(inner, ("theirs", "no. 1"), ("theirs", "no. 3"))


# Cases to hold


async def test_dispatching_nothing_makes_no_row_and_no_error(connection: asyncpg.Connection, outbox: Outbox) -> None:
    with statements(connection) as sent:
        await OutboxDispatcher(connection, outbox).dispatch()
        await asyncio.sleep(0)
    assert sent == []
    async with connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch()
    assert (await outbox.counts(connection)).total == 0


async def test_dispatching_lands_in_the_outbox_with_its_time_no_dispatch_time_and_an_equal_payload(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    payload = {"text": "naïve 日本語", "list": [1, 2.5, None, True], "nested": {"deep": []}}
    message = Message(payload, topic="orders.placed", key="order-1", headers={"trace": "1"}, recorded_at=NOON)
    async with connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(message)
    assert await connection.fetchval("SELECT dispatched_at FROM outbox") is None
    [stored] = await outbox.retrieve(connection, 10)
    assert stored == message
    assert stored.recorded_at == NOON
    assert (stored.payload, stored.key, stored.headers) == (payload, "order-1", {"trace": "1"})


async def test_business_row_and_message_are_both_there_after_commit(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    await place_orders(connection, outbox, 1)
    assert await orders(connection) == [1]
    assert_dispatched(await outbox.retrieve(connection, 10), ("orders.placed", {"number": 1}))


async def test_neither_is_there_after_rollback(connection: asyncpg.Connection, outbox: Outbox) -> None:
    with suppress(Regret):
        async with connection.transaction():
            await place_order(connection, OutboxDispatcher(connection, outbox), 1)
            assert_dispatched(await outbox.retrieve(connection, 10), ("orders.placed", {"number": 1}))
            raise Regret
    assert await orders(connection) == []
    assert_dispatched(await outbox.retrieve(connection, 10))


async def test_neither_is_there_after_an_error_in_the_outbox(connection: asyncpg.Connection, outbox: Outbox) -> None:
    broken = Outbox("broken", schema=outbox.schema)
    await broken.migrate(connection)
    await connection.execute("ALTER TABLE broken DROP COLUMN topic CASCADE")
    with pytest.raises(SchemaError):
        await place_orders(connection, broken, 1)
    assert await orders(connection) == []
    assert await connection.fetchval("SELECT count(*) FROM broken") == 0


async def test_neither_is_there_after_a_message_that_cannot_be_encoded(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    bad = Message({"when": object()}, topic="orders.placed")

    async def place_a_bad_order() -> None:
        async with connection.transaction():
            await place_order(connection, OutboxDispatcher(connection, outbox), 1)
            await OutboxDispatcher(connection, outbox).dispatch(*numbered(2), bad)

    with pytest.raises(CodecError, match=rf"{bad.id}.*when"):
        await place_a_bad_order()
    assert await orders(connection) == []
    assert_dispatched(await outbox.retrieve(connection, 10))


async def test_neither_is_there_after_an_error_in_the_business_insert(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    await connection.execute("INSERT INTO orders VALUES (2)")
    with pytest.raises(asyncpg.UniqueViolationError):
        await place_orders(connection, outbox, 1, 2)
    assert await orders(connection) == [2]
    assert_dispatched(await outbox.retrieve(connection, 10))


async def test_a_savepoint_rolled_back_takes_its_messages_along(connection: asyncpg.Connection, outbox: Outbox) -> None:
    async with connection.transaction():
        dispatcher = OutboxDispatcher(connection, outbox)
        await place_order(connection, dispatcher, 1)
        with suppress(Regret):
            async with connection.transaction():
                await place_order(connection, dispatcher, 2)
                raise Regret
        async with connection.transaction():
            await place_order(connection, dispatcher, 3)
    assert await orders(connection) == [1, 3]
    assert numbers(await outbox.retrieve(connection, 10)) == [1, 3]


async def test_a_failing_insert_surfaces_as_this_librarys_error_with_the_drivers_as_its_cause(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    await connection.execute("ALTER TABLE outbox ADD CONSTRAINT no_secrets CHECK (topic <> 'secret')")
    message = Message("psst", topic="secret")
    with pytest.raises(OutboxError, match=str(message.id)) as caught:
        async with connection.transaction():
            await OutboxDispatcher(connection, outbox).dispatch(message)
    assert isinstance(caught.value.__cause__, asyncpg.CheckViolationError)


async def test_a_message_outside_of_a_transaction_is_refused(connection: asyncpg.Connection, outbox: Outbox) -> None:
    [message] = numbered(1)
    with pytest.raises(NotInTransactionError, match=str(message.id)):
        await OutboxDispatcher(connection, outbox).dispatch(message)
    assert_dispatched(await outbox.retrieve(connection, 10))
