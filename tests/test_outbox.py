"""`Outbox`: every verb, under every name a table can have, and with no more rights than it needs."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outbox import (
    CommitStrategy,
    Counts,
    ExponentialBackOff,
    JsonCodec,
    Message,
    NoWaiting,
    Outbox,
    OutboxDispatcher,
    OutboxError,
    PartialDispatchError,
    RejectedError,
    Relay,
    SchemaError,
)

Connection = Any  # of the driver, or of its pool


@dataclass(frozen=True)
class Money:
    cents: int


LATER = datetime(2999, 1, 1, tzinfo=UTC)


def a_message(payload: Any = 1, **fields: Any) -> Message:
    return Message(payload, **({"topic": "orders"} | fields))


def numbered(count: int, **fields: Any) -> list[Message]:
    return [a_message(number, **fields) for number in range(count)]


def payloads(messages: list[Message]) -> list[Any]:
    return [message.payload for message in messages]


class Destination:
    """Accepts all but "fails" and "rejected", which it refuses every time."""

    def __init__(self, *expected: Any) -> None:
        self.accepted: list[Any] = []
        self._expected = set(expected)
        self.complete = asyncio.Event()

    async def dispatch(self, *messages: Message) -> None:
        errors = {"fails": ConnectionError("no"), "rejected": RejectedError("never")}
        self.accepted += [message.payload for message in messages if message.payload not in errors]
        if self._expected <= set(self.accepted):
            self.complete.set()
        if refused := {message.id: errors[message.payload] for message in messages if message.payload in errors}:
            raise PartialDispatchError(refused)


async def run_until_complete(relay: Relay, destination: Destination) -> None:
    """Runs the relay until its destination has all it expects, or until it fails."""
    running, complete = asyncio.create_task(relay.run()), asyncio.create_task(destination.complete.wait())
    try:
        async with asyncio.timeout(10):
            await asyncio.wait([running, complete], return_when=asyncio.FIRST_COMPLETED)
            await relay.stop()
            await running
    finally:
        running.cancel()
        complete.cancel()
        await asyncio.gather(running, complete, return_exceptions=True)


async def with_a_dead_letter(outbox: Outbox, pool: asyncpg.Pool[Any], *payloads: Any) -> list[Message]:
    """Messages that were given up."""
    messages = [a_message(payload) for payload in payloads]

    class Rejecting:
        async def dispatch(self, *messages: Message) -> None:
            raise PartialDispatchError({message.id: RejectedError(f"never {message.payload}") for message in messages})

    async with pool.acquire() as connection:
        await outbox.persist(connection, *messages)
    assert await Relay(outbox, pool, Rejecting()).run_once() == 0
    return messages


# --- writing and reading --------------------------------------------------------------------------------


async def test_what_is_persisted_is_retrieved_in_order_up_to_the_limit(connection: Connection, outbox: Outbox) -> None:
    await outbox.persist(connection, *numbered(10))
    assert payloads(await outbox.retrieve(connection, 3)) == [0, 1, 2]
    assert payloads(await outbox.retrieve(connection, 100)) == list(range(10))
    assert await outbox.retrieve(connection, 0) == []


async def test_retrieved_messages_are_as_they_were_written(connection: Connection, outbox: Outbox) -> None:
    born = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
    written = a_message({"a": [1, None]}, key="k", headers={"h": "v"}, recorded_at=born)
    await outbox.persist(connection, written)
    [read] = await outbox.retrieve(connection, 1)
    assert (read.id, read.topic, read.key, read.headers) == (written.id, "orders", "k", {"h": "v"})
    assert (read.body, read.payload, read.recorded_at) == (b'{"a":[1,null]}', {"a": [1, None]}, born)
    assert (read.attempts, read.due_at) == (0, None)
    assert isinstance(read.position, int)


async def test_waiting_messages_are_retrieved_in_their_place(connection: Connection, outbox: Outbox) -> None:
    for number in range(6):
        await outbox.persist(connection, a_message(number, due_at=LATER if number % 2 else None))
    assert payloads(await outbox.retrieve(connection, 4)) == [0, 1, 2, 3]


async def test_persisting_needs_no_transaction(connection: Connection, outbox: Outbox) -> None:
    await outbox.persist(connection, a_message())
    await outbox.persist(connection)
    assert len(await outbox.retrieve(connection, 10)) == 1


async def test_a_message_can_be_persisted_twice(connection: Connection, outbox: Outbox) -> None:
    # There is no unique index that writers would have to pay for: whoever receives it knows it by its id.
    message = a_message()
    await outbox.persist(connection, message, message)
    assert await outbox.retrieve(connection, 10) == [message, message]


async def test_the_clock_gives_the_time_of_recording_unless_the_message_has_one(
    connection: Connection, outbox: Outbox
) -> None:
    noon, midnight = datetime(2031, 1, 1, 12, tzinfo=UTC), datetime(2031, 1, 1, tzinfo=UTC)
    clocked = Outbox(outbox.table, schema=outbox.schema, clock=lambda: noon)
    await clocked.persist(connection, a_message(), a_message(recorded_at=midnight), a_message(due_at=LATER))
    assert [message.recorded_at for message in await outbox.retrieve(connection, 10)] == [noon, midnight, noon]


async def test_a_clock_without_a_time_zone_is_refused(connection: Connection, outbox: Outbox) -> None:
    wrong = Outbox(outbox.table, schema=outbox.schema, clock=lambda: datetime(2031, 1, 1))  # noqa: DTZ001 -- the point
    with pytest.raises(ValueError, match=r"clock.*no time zone"):
        await wrong.persist(connection, a_message())
    assert await outbox.retrieve(connection, 1) == []


async def test_the_mapped_name_travels_in_the_header_type(connection: Connection, outbox: Outbox) -> None:
    codec = JsonCodec(types={"money": Money})
    mapped = Outbox(outbox.table, schema=outbox.schema, codec=codec)
    await mapped.persist(connection, a_message(Money(5), headers={"a": "b"}), a_message(1))
    first, second = await mapped.retrieve(connection, 10)
    assert first.headers == {"a": "b", "type": "money"}
    assert second.headers == {}
    assert first.payload == Money(5)


async def test_another_format_is_another_codec(connection: Connection, outbox: Outbox) -> None:
    class Text:
        def encode(self, payload: Any) -> tuple[str | None, bytes]:
            return type(payload).__name__, str(payload).encode("utf-16")

        def decode(self, body: bytes, type_name: str | None) -> Any:
            return type_name, body.decode("utf-16")

    text = Outbox(outbox.table, schema=outbox.schema, codec=Text())
    await text.persist(connection, a_message(12))
    [message] = await text.retrieve(connection, 1)
    assert message.payload == ("int", "12")


# --- any text survives ----------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
NAMED = st.dictionaries(TEXT, TEXT).filter(lambda headers: "type" not in headers)
MESSAGES = st.builds(
    Message,
    st.none() | st.text() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False),
    topic=TEXT.filter(bool),
    key=st.none() | TEXT,
    headers=NAMED,
    id=st.uuids(),
    due_at=st.sampled_from([None, LATER]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(MESSAGES, min_size=1, max_size=20))
async def test_any_valid_text_in_topic_key_and_headers_comes_back_byte_for_byte(
    messages: list[Message], connection: Connection, outbox: Outbox
) -> None:
    await outbox.clear(connection)
    await outbox.persist(connection, *messages)
    found = await outbox.retrieve(connection, 100)
    expected = [one for one in messages if one.due_at is None] + [one for one in messages if one.due_at]
    assert [everything(message) for message in found] == [everything(message) for message in expected]


def everything(message: Message) -> tuple[Any, ...]:
    return message.id, message.topic, message.key, dict(message.headers), message.body, repr(message.payload)


# --- settling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("due_at", [None, LATER], ids=["fresh", "waiting"])
async def test_marked_messages_are_kept_and_not_retrieved(
    due_at: datetime | None, connection: Connection, outbox: Outbox
) -> None:
    await outbox.persist(connection, *numbered(10, due_at=due_at))
    await outbox.mark_dispatched(connection, *(await outbox.retrieve(connection, 3)))
    assert payloads(await outbox.retrieve(connection, 100)) == list(range(3, 10))
    waiting = 7 if due_at else 0
    assert await outbox.counts(connection) == Counts(total=10, dispatched=3, pending=7, waiting=waiting, dead=0)


async def test_marking_a_message_twice_keeps_the_first_time(connection: Connection, outbox: Outbox) -> None:
    await outbox.persist(connection, a_message())
    [message] = await outbox.retrieve(connection, 1)
    query = f"SELECT dispatched_at FROM {outbox.schema}.outbox"  # noqa: S608 -- our own schema
    await outbox.mark_dispatched(connection, message)
    first = await connection.fetchval(query)
    await outbox.mark_dispatched(connection, message, message)
    assert await connection.fetchval(query) == first is not None


@pytest.mark.parametrize("due_at", [None, LATER], ids=["fresh", "waiting"])
async def test_removing_two_of_four_leaves_the_other_two(
    due_at: datetime | None, connection: Connection, outbox: Outbox
) -> None:
    await outbox.persist(connection, *numbered(4, due_at=due_at))
    messages = await outbox.retrieve(connection, 4)
    await outbox.remove(connection, messages[1], messages[3])
    assert payloads(await outbox.retrieve(connection, 100)) == [0, 2]


async def test_settling_is_part_of_the_transaction_around_it(connection: Connection, outbox: Outbox) -> None:
    await outbox.persist(connection, *numbered(2))
    one, two = await outbox.retrieve(connection, 2)
    transaction = connection.transaction()
    await transaction.start()
    await outbox.remove(connection, one)
    await outbox.mark_dispatched(connection, two)
    await transaction.rollback()
    assert payloads(await outbox.retrieve(connection, 2)) == [0, 1]


async def test_settling_nothing_is_no_error(connection: Connection, outbox: Outbox) -> None:
    await outbox.mark_dispatched(connection)
    await outbox.remove(connection)


@pytest.mark.parametrize("verb", ["mark_dispatched", "remove"])
async def test_a_message_that_was_never_stored_cannot_be_settled(
    verb: str, connection: Connection, outbox: Outbox
) -> None:
    message = a_message()
    with pytest.raises(ValueError, match=rf"message {message.id} has no position: only messages from retrieve\(\)"):
        await getattr(outbox, verb)(connection, message)


async def test_settling_what_is_gone_already_is_no_error(connection: Connection, outbox: Outbox) -> None:
    await outbox.persist(connection, a_message())
    [message] = await outbox.retrieve(connection, 1)
    await outbox.remove(connection, message)
    await outbox.remove(connection, message)
    await outbox.mark_dispatched(connection, message)
    assert (await outbox.counts(connection)).total == 0


async def test_clearing_leaves_nothing_at_all(connection: Connection, pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    await with_a_dead_letter(outbox, pool, 0)
    await outbox.persist(connection, *numbered(3), a_message(due_at=LATER))
    await outbox.mark_dispatched(connection, *(await outbox.retrieve(connection, 1)))
    assert await outbox.counts(connection) == Counts(total=4, dispatched=1, pending=3, waiting=1, dead=1)
    await outbox.clear(connection)
    assert await outbox.counts(connection) == Counts(total=0, dispatched=0, pending=0, waiting=0, dead=0)


async def test_cleanup_deletes_marked_messages_of_that_age_up_to_the_limit(
    connection: Connection, outbox: Outbox
) -> None:
    await outbox.persist(connection, *numbered(10))
    await outbox.mark_dispatched(connection, *(await outbox.retrieve(connection, 7)))
    assert await outbox.cleanup(connection, timedelta(hours=1), 100) == 0
    assert await outbox.cleanup(connection, timedelta(), 5) == 5
    assert await outbox.counts(connection) == Counts(total=5, dispatched=2, pending=3, waiting=0, dead=0)
    assert await outbox.cleanup(connection, timedelta(), 5) == 2
    assert await outbox.cleanup(connection, timedelta(), 5) == 0
    assert payloads(await outbox.retrieve(connection, 10)) == [7, 8, 9]


async def test_the_counts_are_of_one_snapshot_also_inside_a_transaction(connection: Connection, outbox: Outbox) -> None:
    async with connection.transaction():
        await outbox.persist(connection, *numbered(3))
        assert (await outbox.counts(connection)).pending == 3


# --- the oldest -----------------------------------------------------------------------------------------


HOUR = timedelta(hours=1)
NEVER = [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)]  # the infinities of the database


async def oldest(connection: Connection, outbox: Outbox) -> timedelta:
    age = (await outbox.counts(connection)).oldest
    assert age is not None
    return age


async def ago(connection: Connection, hours: float) -> datetime:
    now: datetime = await connection.fetchval("SELECT clock_timestamp()")
    return now - HOUR * hours


async def test_the_oldest_is_the_longest_wait_of_all_that_are_due(connection: Connection, outbox: Outbox) -> None:
    assert (await outbox.counts(connection)).oldest is None
    await outbox.persist(connection, a_message(recorded_at=await ago(connection, 1)), a_message())
    assert HOUR <= await oldest(connection, outbox) < HOUR * 1.1
    # It was recorded long ago, and has been due for two hours.
    recorded_at, due_at = await ago(connection, 9), await ago(connection, 2)
    await outbox.persist(connection, a_message(recorded_at=recorded_at, due_at=due_at))
    assert HOUR * 2 <= await oldest(connection, outbox) < HOUR * 2.1
    await outbox.persist(connection, a_message(recorded_at=await ago(connection, 3)))
    assert HOUR * 3 <= await oldest(connection, outbox) < HOUR * 3.1


async def test_what_is_delayed_dispatched_or_dead_is_not_the_oldest(
    connection: Connection, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await with_a_dead_letter(outbox, pool, 0)
    await outbox.persist(connection, a_message())
    await outbox.mark_dispatched(connection, *(await outbox.retrieve(connection, 1)))
    await outbox.persist(connection, a_message(recorded_at=await ago(connection, 1), due_at=LATER))
    counts = await outbox.counts(connection)
    assert (counts.dispatched, counts.waiting, counts.dead) == (1, 1, 1)
    assert counts.oldest is None


async def test_what_waits_for_its_next_attempt_or_behind_another_of_its_key_is_not_the_oldest(
    connection: Connection, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    class Failing:
        async def dispatch(self, *messages: Message) -> None:
            raise PartialDispatchError({message.id: ConnectionError("no") for message in messages})

    recorded_at = await ago(connection, 1)
    await outbox.persist(connection, *numbered(2, key="k", recorded_at=recorded_at))
    backoff = ExponentialBackOff(initial=HOUR, maximum=HOUR)
    await Relay(outbox, pool, Failing(), order="key", backoff=backoff).run_once()
    counts = await outbox.counts(connection)
    assert (counts.waiting, counts.oldest) == (2, None)


async def test_a_dead_letter_that_was_redriven_counts_from_then_on(
    connection: Connection, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await outbox.persist(connection, a_message("rejected", recorded_at=await ago(connection, 1)))
    await Relay(outbox, pool, Destination()).run_once()
    await outbox.redrive(connection)
    assert timedelta() <= await oldest(connection, outbox) < HOUR / 2


@pytest.mark.parametrize("time", [LATER, *NEVER], ids=["ahead", "-infinity", "infinity"])
async def test_the_wait_is_never_negative_or_endless_whatever_time_the_writer_gave(
    time: datetime, connection: Connection, outbox: Outbox
) -> None:
    await outbox.persist(connection, a_message(recorded_at=time))
    assert timedelta() <= await oldest(connection, outbox) < HOUR * 24 * 365 * 100
    await outbox.clear(connection)
    await outbox.persist(connection, a_message(recorded_at=time, due_at=await ago(connection, 1)))
    assert timedelta() <= await oldest(connection, outbox) < HOUR * 1.1


async def test_due_since_ever_is_due_since_it_was_recorded(connection: Connection, outbox: Outbox) -> None:
    await outbox.persist(connection, a_message(recorded_at=await ago(connection, 1), due_at=NEVER[0]))
    assert HOUR <= await oldest(connection, outbox) < HOUR * 1.1


# --- dead letters ---------------------------------------------------------------------------------------


async def test_dead_letters_hold_the_message_the_error_and_the_attempts(
    connection: Connection, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    [message] = await with_a_dead_letter(outbox, pool, "x")
    now = await connection.fetchval("SELECT clock_timestamp()")
    [letter] = await outbox.dead_letters(connection)
    assert letter.message == message
    assert (letter.error, letter.attempts, letter.message.attempts) == ("RejectedError: never x", 1, 1)
    assert now - timedelta(minutes=1) < letter.died_at < now
    assert letter.message.position is not None
    assert await outbox.retrieve(connection, 10) == []


async def test_dead_letters_come_in_order_up_to_the_limit_or_by_name(
    connection: Connection, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    messages = await with_a_dead_letter(outbox, pool, *range(5))
    assert [one.message.payload for one in await outbox.dead_letters(connection)] == [0, 1, 2, 3, 4]
    assert [one.message.payload for one in await outbox.dead_letters(connection, limit=2)] == [0, 1]
    named = await outbox.dead_letters(connection, [messages[4].id, messages[1].id, uuid4()])
    assert [one.message.payload for one in named] == [1, 4]


async def test_redriven_messages_are_due_at_once_with_all_their_attempts_before_them(
    connection: Connection, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    messages = await with_a_dead_letter(outbox, pool, *range(5))
    before = {one.message.id: one.message.position for one in await outbox.dead_letters(connection)}
    assert await outbox.redrive(connection, [messages[3].id, messages[1].id, uuid4()]) == 2
    redriven = await outbox.retrieve(connection, 10)
    assert redriven == [messages[1], messages[3]]
    assert [one.position for one in redriven] == [before[one.id] for one in redriven]
    assert [one.attempts for one in redriven] == [0, 0]
    destination = Destination()
    assert await Relay(outbox, pool, destination).run_once() == 2
    assert destination.accepted == [1, 3]


async def test_redriving_none_by_name_redrives_all_in_order(
    connection: Connection, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await with_a_dead_letter(outbox, pool, *range(5))
    assert await outbox.redrive(connection) == 5
    assert await outbox.redrive(connection) == 0
    destination = Destination()
    assert await Relay(outbox, pool, destination).run_once() == 5
    assert destination.accepted == [0, 1, 2, 3, 4]


async def test_discarding_deletes_those_named_and_never_any_other(
    connection: Connection, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    messages = await with_a_dead_letter(outbox, pool, *range(3))
    assert await outbox.discard(connection, []) == 0
    assert await outbox.discard(connection, [uuid4()]) == 0
    assert await outbox.discard(connection, [messages[1].id, messages[1].id]) == 1
    assert [one.message.payload for one in await outbox.dead_letters(connection)] == [0, 2]


async def test_a_dead_letter_that_was_redriven_can_die_again(
    connection: Connection, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await with_a_dead_letter(outbox, pool, "rejected")
    for _ in range(2):
        assert await outbox.redrive(connection) == 1
        assert await Relay(outbox, pool, Destination()).run_once() == 0
        [letter] = await outbox.dead_letters(connection)
        assert letter.error == "RejectedError: never"


# --- errors ---------------------------------------------------------------------------------------------

VERBS: dict[str, tuple[Any, ...]] = {
    "persist": (a_message(),),
    "retrieve": (10,),
    "clear": (),
    "cleanup": (timedelta(), 10),
    "counts": (),
    "dead_letters": (),
    "redrive": (),
    "discard": ([uuid4()],),
}


@pytest.mark.parametrize("verb", VERBS)
async def test_every_verb_on_a_missing_table_says_how_to_make_it(
    verb: str, connection: Connection, outbox: Outbox
) -> None:
    missing = Outbox("missing", schema=outbox.schema)
    with pytest.raises(SchemaError, match=r"run outbox\.migrate\(connection\), or apply outbox\.schema_sql\(\)"):
        await getattr(missing, verb)(connection, *VERBS[verb])


@pytest.mark.parametrize("verb", [*VERBS, "migrate", "check"])
async def test_every_verb_on_a_closed_connection_raises_our_error_with_the_drivers_as_its_cause(
    verb: str, dsn: str, outbox: Outbox
) -> None:
    closed = await asyncpg.connect(dsn)
    await closed.close()
    with pytest.raises(OutboxError, match=r"^Outbox\('outbox', schema='test_.*closed") as caught:
        await getattr(outbox, verb)(closed, *VERBS.get(verb, ()))
    assert isinstance(caught.value.__cause__, asyncpg.InterfaceError)


@pytest.mark.parametrize(("verb", "arguments"), [("retrieve", (-1,)), ("cleanup", (timedelta(), -1))])
async def test_a_limit_below_zero_is_our_error(
    verb: str, arguments: tuple[Any, ...], connection: Connection, outbox: Outbox
) -> None:
    with pytest.raises(OutboxError, match="LIMIT"):
        await getattr(outbox, verb)(connection, *arguments)


def test_the_repr_says_which_outbox_it_is() -> None:
    assert repr(Outbox("a", schema="b")) == "Outbox('a', schema='b')"


# --- names ----------------------------------------------------------------------------------------------

LONGEST = 49  # bytes of a table's name, so that the longest name made from it is not cut

NAMES = [
    "Outgoing mail",
    "UPPER",
    "select",
    "with.dot",
    'quo"te',
    '"',
    '""',
    "apostrophe's",
    "''",
    'a"; DROP TABLE b; --',
    "a'; DROP TABLE b; --",
    "-- comment",
    "/* comment",
    "percent %s %d %(x)s %",
    "{x}",
    "{outbox} {{}}",
    "{",
    "back\\slash",
    "\\'; --",
    "$1",
    "pay$1day",
    "$$",
    ":name",
    "new\nline\ttab",
    " ",
    "ünïcödé 📬",
    "\u202e\u0301",
    "o" * LONGEST,
    "ü" * (LONGEST // 2),
]


async def whole_life(outbox: Outbox, connection: Connection, pool: asyncpg.Pool[Any]) -> None:
    """Does everything that an outbox can do."""
    await outbox.migrate(connection)
    await outbox.migrate(connection)
    await outbox.check(connection)
    async with connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(a_message("one"))
        await OutboxDispatcher(connection, outbox).dispatch(
            a_message("two"), a_message("fails"), a_message("rejected"), a_message("due", due_at=datetime.now(UTC))
        )
    await outbox.persist(connection, a_message("delayed", due_at=LATER))
    destination = Destination("one", "two", "due")
    backoff = NoWaiting(max_tries=2)
    relay = Relay(outbox, pool, destination, backoff=backoff, commit=CommitStrategy.MARK, keep=timedelta(), listen=True)
    await run_until_complete(relay, destination)
    while (await outbox.counts(connection)).waiting > 1:
        await Relay(outbox, pool, destination, backoff=backoff).run_once()
    await outbox.cleanup(connection, timedelta(), 100)
    assert await outbox.counts(connection) == Counts(total=1, dispatched=0, pending=1, waiting=1, dead=2)
    letters = await outbox.dead_letters(connection)
    assert [letter.message.payload for letter in letters] == ["fails", "rejected"]
    assert await outbox.redrive(connection, [letters[0].message.id]) == 1
    assert await outbox.discard(connection, [letters[1].message.id]) == 1
    again, delayed = await outbox.retrieve(connection, 10)
    assert (again.payload, delayed.payload) == ("fails", "delayed")
    await outbox.mark_dispatched(connection, again)
    await outbox.remove(connection, delayed)
    assert await outbox.cleanup(connection, timedelta(), 10) == 1
    await outbox.persist(connection, Message("ordered", topic="t", key="a"))
    assert await Relay(outbox, pool, Destination("ordered"), order="key").run_once() == 1
    await outbox.clear(connection)


@pytest.mark.parametrize("schema", ["plain", None], ids=["in a plain schema", "in a schema of the same name"])
@pytest.mark.parametrize("name", NAMES, ids=ascii)
async def test_an_outbox_lives_under_any_name(
    name: str, schema: str | None, connection: Connection, pool: asyncpg.Pool[Any]
) -> None:
    outbox = Outbox(name, schema=schema or name)
    try:
        await whole_life(outbox, connection, pool)
        tables = await connection.fetch("SELECT relname FROM pg_class WHERE relkind = 'r' AND relname LIKE '%_waiting'")
        assert [row["relname"] for row in tables] == [f"{name}_waiting"]
    finally:
        await dropped(connection, outbox.schema)


async def dropped(connection: Connection, schema: str) -> None:
    await connection.execute("SET client_min_messages = warning")
    await connection.execute('DROP SCHEMA IF EXISTS "{}" CASCADE'.format(schema.replace('"', '""')))


async def test_a_schema_name_may_have_63_bytes(connection: Connection, pool: asyncpg.Pool[Any]) -> None:
    outbox = Outbox("o" * LONGEST, schema="s" * 63)
    try:
        await whole_life(outbox, connection, pool)
    finally:
        await dropped(connection, outbox.schema)


@pytest.mark.parametrize("name", ["o" * (LONGEST + 1), "ü" * 25, "📬" * 13], ids=ascii)
def test_a_table_name_that_is_too_long_is_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match=f"is too long: at most {LONGEST} bytes"):
        Outbox(name)


@pytest.mark.parametrize("name", ["s" * 64, "ü" * 32], ids=ascii)
def test_a_schema_name_that_is_too_long_is_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match="is too long: PostgreSQL keeps 63 bytes of it"):
        Outbox(schema=name)


@pytest.mark.parametrize("name", ["", "a\0b", "\ud800"], ids=ascii)
@pytest.mark.parametrize("argument", ["table", "schema"])
def test_a_name_that_no_table_can_have_is_refused_at_once(argument: str, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a table or schema") as caught:
        Outbox(name) if argument == "table" else Outbox(schema=name)
    str(caught.value).encode()


def test_the_class_of_a_codec_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"codec must be an object, not its class: JsonCodec\(…\)"):
        Outbox(codec=JsonCodec)  # type: ignore[arg-type]  # the mistake to be told


# --- several outboxes -----------------------------------------------------------------------------------


async def whole(connection: Connection, *outboxes: Outbox) -> list[tuple[list[Any], Counts]]:
    return [(payloads(await one.retrieve(connection, 100)), await one.counts(connection)) for one in outboxes]


@pytest.mark.parametrize("names", [("a", "A"), ("a", "a b"), ("o" * 48 + "1", "o" * 48 + "2")], ids=str)
async def test_two_outboxes_in_one_schema_do_not_touch_each_other(
    names: tuple[str, str], connection: Connection, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    one, two = (Outbox(name, schema=outbox.schema) for name in names)
    await one.migrate(connection)
    await two.migrate(connection)
    await two.persist(connection, a_message("theirs"), a_message("theirs, delayed", due_at=LATER))
    before = await whole(connection, two, outbox)
    await whole_life(one, connection, pool)
    await with_a_dead_letter(one, pool, "dead")
    await one.redrive(connection)
    await one.clear(connection)
    assert await whole(connection, two, outbox) == before
    assert before[0][0] == ["theirs", "theirs, delayed"]


async def test_the_same_table_in_two_schemas_is_two_outboxes(
    connection: Connection, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    other = Outbox(outbox.table, schema=f"{outbox.schema} 2")
    await outbox.persist(connection, a_message("ours"))
    try:
        await whole_life(other, connection, pool)
        assert payloads(await outbox.retrieve(connection, 10)) == ["ours"]
    finally:
        await dropped(connection, other.schema)


@pytest.mark.parametrize("suffix", ["waiting", "dead", "claims", "relays", "version"])
async def test_an_outbox_whose_name_is_taken_by_a_table_of_another_is_refused_and_leaves_that_one_alone(
    suffix: str, connection: Connection, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    clash = Outbox(f"outbox_{suffix}", schema=outbox.schema)
    with pytest.raises(OutboxError, match=r"cannot migrate.*already exists"):
        await clash.migrate(connection)
    with pytest.raises(SchemaError):
        await clash.check(connection)
    await whole_life(outbox, connection, pool)


# --- rights ---------------------------------------------------------------------------------------------

# What a role needs, and nothing of it is more than that: each grant is taken away once below.
A_WRITER = ["USAGE ON SCHEMA {schema}", "INSERT ON {schema}.outbox"]
A_WRITER_OF_DELAYED_MESSAGES = [
    "USAGE ON SCHEMA {schema}",
    "INSERT ON {schema}.outbox_waiting",
    "USAGE ON SEQUENCE {schema}.outbox_position",
]
A_RELAY = [
    "USAGE ON SCHEMA {schema}",
    "SELECT ON {schema}.outbox_version",
    "SELECT ON SEQUENCE {schema}.outbox_position",
    "SELECT ON {schema}.outbox",
    "UPDATE ON {schema}.outbox",
    "DELETE ON {schema}.outbox",
    "SELECT ON {schema}.outbox_waiting",
    "INSERT ON {schema}.outbox_waiting",
    "UPDATE ON {schema}.outbox_waiting",
    "DELETE ON {schema}.outbox_waiting",
    "INSERT ON {schema}.outbox_dead",
    "SELECT ON {schema}.outbox_claims",
    "INSERT ON {schema}.outbox_claims",
    "DELETE ON {schema}.outbox_claims",
    "SELECT ON {schema}.outbox_relays",
    "INSERT ON {schema}.outbox_relays",
    "UPDATE ON {schema}.outbox_relays",
    "DELETE ON {schema}.outbox_relays",
    "SELECT ON {schema}.outbox_slots",
    "UPDATE ON {schema}.outbox_slots",
]
# A message that had to wait goes back into the outbox when it is marked.
A_RELAY_THAT_MARKS = [*A_RELAY, "INSERT ON {schema}.outbox"]


# It parks, and lets go on; and what it notes of what is in its hands may stand there already.
A_RELAY_IN_ORDER = [
    *A_RELAY,
    "UPDATE ON {schema}.outbox_claims",
    "SELECT ON {schema}.outbox_dead",
    "DELETE ON {schema}.outbox_dead",
]


class Role:
    """A role without any right but those it is granted."""

    def __init__(self, name: str, dsn: str, connection: Connection, outbox: Outbox) -> None:
        self.connection = connection
        self.outbox = outbox
        self._name = name
        address = urlsplit(dsn)
        self.dsn = address._replace(netloc=f"{name}@{address.hostname}:{address.port}").geturl()

    @asynccontextmanager
    async def granted(self, grants: list[str], *, without: str | None = None) -> AsyncIterator[None]:
        for grant in grants:
            if grant != without:
                await self.connection.execute(f"GRANT {grant.format(schema=self.outbox.schema)} TO {self._name}")
        yield
        await self.connection.execute(f"DROP OWNED BY {self._name}")

    async def write(self, *messages: Message) -> None:
        restricted = await asyncpg.connect(self.dsn)
        try:
            async with restricted.transaction():
                await OutboxDispatcher(restricted, self.outbox).dispatch(*messages)
        finally:
            await restricted.close()

    async def park(self) -> None:
        """Delivers in order, parks a key, and lets it go on when its head has been discarded."""
        rejected, *_ = messages = [Message(text, topic="t", key="a") for text in ("rejected", "one", "two")]
        await self.outbox.persist(self.connection, *messages)
        destination = Destination("one", "two")
        async with asyncpg.create_pool(self.dsn, min_size=0, max_size=2) as pool:
            relay = Relay(self.outbox, pool, destination, order="key", on_failure="park", batch_size=1)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(relay.run())
                await self._until_dead(len(messages))
                await self.outbox.discard(self.connection, [rejected.id])
                await destination.complete.wait()
                await relay.stop()
        assert (await self.outbox.counts(self.connection)).dead == 0

    async def _until_dead(self, count: int) -> None:
        while (await self.outbox.counts(self.connection)).dead < count:  # noqa: ASYNC110 -- a row, no event
            await asyncio.sleep(0.01)

    async def relay(self, commit: CommitStrategy) -> None:
        """Delivers, retries, buries, and takes over from a relay that died."""
        outbox, connection, schema = self.outbox, self.connection, self.outbox.schema
        await outbox.persist(connection, *(a_message(payload) for payload in ("good", "fails", "rejected", "orphan")))
        await outbox.persist(connection, a_message("due", due_at=datetime.now(UTC)))
        *_, orphan, _ = await outbox.retrieve(connection, 10)
        dead, positions = uuid4(), [orphan.position]
        await connection.execute(f"INSERT INTO {schema}.outbox_relays VALUES ($1, 'epoch')", dead)  # noqa: S608 -- ours
        claim = f"INSERT INTO {schema}.outbox_claims VALUES ($1, $2, $3)"  # noqa: S608 -- our own schema
        await connection.execute(claim, orphan.position, dead, positions)

        destination = Destination("good", "due", "orphan")
        keep = timedelta() if commit is CommitStrategy.MARK else None
        settings: dict[str, Any] = {"commit": commit, "keep": keep, "backoff": NoWaiting(max_tries=1)}
        async with asyncpg.create_pool(self.dsn, min_size=0, max_size=2) as pool:
            relay = Relay(outbox, pool, destination, grace=timedelta(seconds=1), **settings)
            await run_until_complete(relay, destination)
            while (await outbox.counts(connection)).pending:
                await Relay(outbox, pool, destination, **settings).run_once()
        letters = await outbox.dead_letters(connection)
        assert [letter.message.payload for letter in letters] == ["fails", "rejected"]


@pytest.fixture
async def role(dsn: str, connection: Connection, outbox: Outbox) -> AsyncIterator[Role]:
    name = f"role_{uuid4().hex}"
    await connection.execute(f"CREATE ROLE {name} LOGIN")
    yield Role(name, dsn, connection, outbox)
    await connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("grants", "due_at"), [(A_WRITER, None), (A_WRITER_OF_DELAYED_MESSAGES, LATER)], ids=["fresh", "delayed"]
)
async def test_a_writer_needs_these_rights_and_no_others(
    grants: list[str], due_at: datetime | None, count: int, role: Role
) -> None:
    messages = numbered(count, due_at=due_at)
    async with role.granted(grants):
        await role.write(*messages)
    assert await role.outbox.retrieve(role.connection, 10) == messages
    for grant in grants:
        async with role.granted(grants, without=grant):
            with pytest.raises(OutboxError, match="permission denied") as caught:
                await role.write(*messages)
            assert isinstance(caught.value.__cause__, asyncpg.InsufficientPrivilegeError)
    assert await role.outbox.retrieve(role.connection, 10) == messages


async def test_a_writer_can_neither_read_nor_delete_what_was_written(role: Role) -> None:
    async with role.granted(A_WRITER):
        restricted = await asyncpg.connect(role.dsn)
        for verb in ("retrieve", "clear", "counts", "redrive", "dead_letters"):
            with pytest.raises(OutboxError, match="permission denied"):
                await getattr(role.outbox, verb)(restricted, *VERBS[verb])
        await restricted.close()


COMMITS = [(A_RELAY, CommitStrategy.DELETE), (A_RELAY_THAT_MARKS, CommitStrategy.MARK)]


@pytest.mark.parametrize(("grants", "commit"), COMMITS, ids=["delete", "mark"])
async def test_a_relay_needs_no_more_than_these_rights(grants: list[str], commit: CommitStrategy, role: Role) -> None:
    async with role.granted(grants):
        await role.relay(commit)


async def test_a_relay_that_keeps_an_order_needs_no_more_than_these_rights(role: Role) -> None:
    async with role.granted(A_RELAY_IN_ORDER):
        await role.park()


@pytest.mark.parametrize("without", A_RELAY_IN_ORDER[len(A_RELAY) :])
async def test_a_relay_that_keeps_an_order_does_not_get_by_without_one_of_them(without: str, role: Role) -> None:
    async with role.granted(A_RELAY_IN_ORDER, without=without):
        with pytest.raises(ExceptionGroup) as caught:
            await role.park()
    assert caught.group_contains(OutboxError, match="permission denied")


EACH_GRANT = [
    *(pytest.param(A_RELAY, CommitStrategy.DELETE, grant, id=grant) for grant in A_RELAY),
    pytest.param(A_RELAY_THAT_MARKS, CommitStrategy.MARK, A_RELAY_THAT_MARKS[-1], id="to mark, INSERT"),
]


@pytest.mark.parametrize(("grants", "commit", "without"), EACH_GRANT)
async def test_a_relay_without_one_of_its_rights_ends_with_an_error_that_names_the_table(
    grants: list[str], commit: CommitStrategy, without: str, role: Role
) -> None:
    async with role.granted(grants, without=without):
        with pytest.raises(OutboxError, match="permission denied") as caught:
            await role.relay(commit)
    assert isinstance(caught.value.__cause__, asyncpg.InsufficientPrivilegeError)
    name = without.rpartition(" ")[2].format(schema=role.outbox.schema).rpartition(".")[2]
    assert name in str(caught.value)


async def test_stop_returns_at_once_when_the_relay_ends_with_an_error(role: Role) -> None:
    await role.outbox.persist(role.connection, a_message("good"), a_message("rejected"))
    destination = Destination("good")
    async with (
        role.granted(A_RELAY, without="INSERT ON {schema}.outbox_dead"),
        asyncpg.create_pool(role.dsn, min_size=0, max_size=2) as pool,
    ):
        relay = Relay(role.outbox, pool, destination, grace=timedelta(minutes=1))
        running = asyncio.create_task(relay.run())
        await destination.complete.wait()
        try:
            async with asyncio.timeout(3):  # and not after the grace period
                await relay.stop()
        finally:
            [error] = await asyncio.gather(running, return_exceptions=True)
    assert isinstance(error, OutboxError)
