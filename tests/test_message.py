"""`Message`: what it refuses at the door, and that what it took stays as it is."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import copy
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from enum import StrEnum
from types import SimpleNamespace
from typing import Any
from uuid import RFC_4122, UUID, uuid4

import asyncpg
import pytest

from outbox import Codec, CodecError, JsonCodec, Message, Outbox, Relay

NOW = datetime(2031, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
FIELDS = ["id", "topic", "key", "headers", "payload", "body", "recorded_at", "due_at", "position", "attempts"]


class Counting:
    """A codec that counts how often it is used."""

    def __init__(self) -> None:
        self.encoded = self.decoded = 0

    def encode(self, payload: Any) -> tuple[str | None, bytes]:
        self.encoded += 1
        return JsonCodec().encode(payload)

    def decode(self, body: bytes, type_name: str | None) -> Any:
        self.decoded += 1
        return JsonCodec().decode(body, type_name)


class Collecting:
    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def dispatch(self, *messages: Message) -> None:
        self.messages += messages


def a_message(**changes: Any) -> Message:
    given: dict[str, Any] = {"payload": {"order": 1}, "topic": "orders", "key": "order-1", "headers": {"a": "b"}}
    return Message(**(given | changes))


async def stored(
    connection: asyncpg.Connection[Any], outbox: Outbox, *messages: Message, codec: Codec | None = None
) -> list[Message]:
    """The messages as they come back from the table."""
    await outbox.persist(connection, *messages)
    return await Outbox(outbox.table, schema=outbox.schema, codec=codec).retrieve(connection, 1000)


async def overwrite_payload(connection: asyncpg.Connection[Any], outbox: Outbox, payload: bytes) -> None:
    await connection.execute(f"UPDATE {outbox.schema}.outbox SET payload = $1", payload)  # noqa: S608 -- our own schema


# --- the identity ---------------------------------------------------------------------------------------


def test_an_id_is_a_uuid_of_version_7_with_the_time_in_its_first_48_bits() -> None:
    before = time.time_ns() // 1_000_000
    message = a_message()
    after = time.time_ns() // 1_000_000
    assert (message.id.version, message.id.variant) == (7, RFC_4122)
    assert before <= message.id.int >> 80 <= after


def test_all_other_bits_of_an_id_are_random() -> None:
    ids = [a_message().id.int for _ in range(2000)]
    assert len(set(ids)) == len(ids)
    random = [bit for bit in range(80) if bit not in {62, 63, 76, 77, 78, 79}]
    assert len(random) == 74
    # The odds of one of them being the same 2000 times are 1 in 2 ** 1999.
    assert all({one >> bit & 1 for one in ids} == {0, 1} for bit in random)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_process_that_was_forked_gives_other_ids_than_its_parent() -> None:
    script = """
import os
from outbox import Message
Message(0, topic="t")
reader, writer = os.pipe()
if not os.fork():
    os.write(writer, Message(1, topic="t").id.bytes)
    os._exit(0)
os.wait()
print(os.read(reader, 16)[8:] == Message(2, topic="t").id.bytes[8:])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_id_that_was_given_is_kept() -> None:
    given = uuid4()
    assert a_message(id=given).id == given


def test_what_was_not_given_is_empty() -> None:
    message = Message(None, topic="t")
    assert (message.key, message.headers, message.recorded_at, message.due_at) == (None, {}, None, None)
    assert (message.payload, message.body, message.position, message.attempts) == (None, b"null", None, 0)


# --- immutability ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
def test_no_field_can_be_set_or_deleted(field: str) -> None:
    message = a_message()
    before = getattr(message, field)
    with pytest.raises(AttributeError):
        setattr(message, field, before)
    with pytest.raises(AttributeError):
        delattr(message, field)
    assert getattr(message, field) == before


def test_no_new_field_can_be_added() -> None:
    with pytest.raises(AttributeError):
        a_message().tenant = 1  # type: ignore[attr-defined]  # the point


async def test_texts_that_are_members_of_an_enum_are_stored_as_what_they_say(
    connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    class Name(StrEnum):
        TENANT = "tenant"

    message = a_message(headers={Name.TENANT: Name.TENANT}, topic=Name.TENANT, key=Name.TENANT)
    (read,) = await stored(connection, outbox, message)
    assert (read.headers, read.topic, read.key) == ({"tenant": "tenant"}, "tenant", "tenant")


def test_headers_are_read_only() -> None:
    message = a_message()
    with pytest.raises(TypeError):
        message.headers["a"] = "c"  # type: ignore[index]  # the point
    assert not hasattr(message.headers, "update")
    assert message.headers == {"a": "b"}


async def test_headers_that_came_from_the_table_are_read_only(
    connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    for message in await stored(connection, outbox, a_message(), a_message(headers={})):
        with pytest.raises(TypeError):
            message.headers["a"] = "c"  # type: ignore[index]  # the point


def test_changing_the_headers_one_has_given_changes_no_message() -> None:
    headers = {"a": "b"}
    message = a_message(headers=headers)
    copied = message.with_headers(headers)
    headers["a"] = headers["x"] = "changed"
    assert message.headers == copied.headers == {"a": "b"}


def test_changing_the_payload_after_the_body_was_made_does_not_change_the_body() -> None:
    payload = {"order": 1}
    message = a_message(payload=payload)
    assert message.body == b'{"order":1}'
    payload["order"] = 2
    assert message.body == b'{"order":1}'


# --- copies ---------------------------------------------------------------------------------------------


def test_a_copy_with_a_header_leaves_the_original_as_it_was() -> None:
    message = a_message()
    copied = message.with_header("trace", "1")
    assert copied.headers == {"a": "b", "trace": "1"}
    assert message.headers == {"a": "b"}


def test_a_copy_with_headers_has_them_over_those_it_had_and_everything_else_unchanged() -> None:
    message = a_message(id=uuid4(), recorded_at=NOW, due_at=NOW)
    copied = message.with_headers({"a": "c", "d": "e"})
    assert copied.headers == {"a": "c", "d": "e"}
    for field in set(FIELDS) - {"headers"}:
        assert getattr(copied, field) == getattr(message, field), field


def test_a_copy_with_no_headers_is_equal() -> None:
    message = a_message()
    assert message.with_headers({}) == message


def test_a_copy_refuses_what_the_original_would_have_refused() -> None:
    message = a_message()
    with pytest.raises(ValueError, match=f"message {message.id}: header 'a' contains NUL"):
        message.with_header("a", "\0")
    with pytest.raises(TypeError, match="header 'a' must be a str, not int"):
        message.with_header("a", 1)  # type: ignore[arg-type]  # the point


async def test_a_copy_of_a_stored_message_keeps_its_place_and_is_as_lazy(
    connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    codec = Counting()
    [message] = await stored(connection, outbox, a_message(), codec=codec)
    copied = message.with_header("trace", "1")
    assert (copied.position, copied.attempts, copied.recorded_at) == (message.position, 0, message.recorded_at)
    assert copied.body is message.body
    assert codec.decoded == 0
    assert copied.payload == {"order": 1}


COPIES: list[Callable[[Message], Message]] = [
    copy.copy,
    copy.deepcopy,
    lambda message: pickle.loads(pickle.dumps(message)),  # noqa: S301 -- our own bytes
]


@pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "pickle"])
def test_a_message_can_be_copied_by_python(copied: Callable[[Message], Message]) -> None:
    message = a_message(recorded_at=NOW, due_at=NOW)
    twin = copied(message)
    assert twin == message
    for field in FIELDS:
        assert getattr(twin, field) == getattr(message, field), field


@pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "pickle"])
@pytest.mark.parametrize("headers", [{}, {"a": "b"}], ids=["no headers", "headers"])
async def test_a_stored_message_can_be_copied_by_python_before_anybody_has_read_it(
    copied: Callable[[Message], Message], headers: dict[str, str], connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    [message] = await stored(connection, outbox, a_message(headers=headers))
    twin = copied(message)
    for field in FIELDS:
        assert getattr(twin, field) == getattr(message, field), field


# --- laziness -------------------------------------------------------------------------------------------


def test_the_payload_of_a_new_message_is_the_very_object_that_was_given() -> None:
    payload = object()
    assert a_message(payload=payload).payload is payload


def test_a_message_is_not_encoded_before_somebody_asks() -> None:
    message = a_message(payload={1, 2})
    assert message.topic == "orders"
    with pytest.raises(CodecError):
        _ = message.body


def test_the_body_is_made_once() -> None:
    message = a_message()
    assert message.body is message.body


@pytest.mark.parametrize("due_at", [None, NOW], ids=["fresh", "delayed"])
@pytest.mark.parametrize("count", [1, 3])
async def test_a_writer_encodes_each_message_once_and_decodes_none(
    count: int, due_at: datetime | None, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    codec = Counting()
    counted = Outbox(outbox.table, schema=outbox.schema, codec=codec)
    await counted.persist(connection, *(a_message(due_at=due_at) for _ in range(count)))
    assert (codec.encoded, codec.decoded) == (count, 0)


async def test_a_relay_forwards_bytes_and_never_decodes_them(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    codec, destination = Counting(), Collecting()
    async with pool.acquire() as connection:
        await outbox.persist(connection, a_message(), a_message(due_at=datetime.now(UTC)), a_message())
    relay = Relay(Outbox(outbox.table, schema=outbox.schema, codec=codec), pool, destination)
    assert await relay.run_once() + await relay.run_once() == 3
    assert [message.body for message in destination.messages] == [b'{"order":1}'] * 3
    assert (codec.encoded, codec.decoded) == (0, 0)
    assert destination.messages[0].payload == {"order": 1}
    assert codec.decoded == 1


async def test_a_payload_is_decoded_once(connection: asyncpg.Connection[Any], outbox: Outbox) -> None:
    codec = Counting()
    [message] = await stored(connection, outbox, a_message(), codec=codec)
    assert message.payload is message.payload
    assert (codec.encoded, codec.decoded) == (0, 1)


async def test_a_body_that_nobody_can_decode_is_forwarded_and_says_whose_it_is_when_it_is_read(
    connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    original = a_message()
    await outbox.persist(connection, original)
    await overwrite_payload(connection, outbox, b"\xff\0 not JSON")
    [message] = await outbox.retrieve(connection, 1)
    assert message.body == b"\xff\0 not JSON"
    assert message.headers == {"a": "b"}
    with pytest.raises(CodecError, match=f"message {original.id}: the body is not JSON"):
        _ = message.payload


@pytest.mark.parametrize("read_first", [False, True], ids=["unread", "read"])
async def test_a_stored_message_goes_into_another_outbox_byte_for_byte(
    read_first: bool,  # noqa: FBT001 -- a parameter of the test
    connection: asyncpg.Connection[Any],
    outbox: Outbox,
) -> None:
    original = a_message(recorded_at=NOW)
    await outbox.persist(connection, original)
    foreign = b'{ "order" : 1.50, "order" : 2 }'  # as another program may have written it
    await overwrite_payload(connection, outbox, foreign)
    [message] = await outbox.retrieve(connection, 1)
    assert not read_first or message.payload == {"order": 2}

    codec = Counting()
    other = Outbox("other", schema=outbox.schema, codec=codec)
    await other.migrate(connection)
    await other.persist(connection, message)
    [forwarded] = await other.retrieve(connection, 1)
    assert forwarded.body == foreign
    assert (codec.encoded, codec.decoded) == (0, 0)
    assert (forwarded.id, forwarded.headers, forwarded.recorded_at) == (original.id, {"a": "b"}, NOW)


# --- equality and repr ----------------------------------------------------------------------------------


def test_messages_with_the_same_id_and_content_are_equal_and_hash_the_same() -> None:
    one, identity = a_message(), uuid4()
    one, two = a_message(id=identity), a_message(id=identity)
    assert one == two
    assert len({one, two}) == 1


@pytest.mark.parametrize(
    "change",
    [{"id": UUID(int=7)}, {"topic": "x"}, {"key": None}, {"headers": {}}, {"headers": {"a": "c"}}, {"payload": {}}],
    ids=str,
)
def test_a_difference_in_what_a_destination_sees_makes_messages_differ(change: dict[str, Any]) -> None:
    identity = uuid4()
    assert a_message(id=identity) != a_message(**({"id": identity} | change))


async def test_what_a_broker_gave_goes_into_an_outbox_byte_for_byte_read_or_not(
    connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    identity, body = uuid4(), b'{ "order" : 1.50 }'
    headers = {"a": "b"}
    given = {"topic": "t", "key": "k", "headers": headers, "id": identity, "recorded_at": NOW}
    received = Message.from_body(body, **given)  # type: ignore[arg-type]  # a dict of every argument's type
    assert received.payload == {"order": 1.5}
    await outbox.persist(connection, received, Message.from_body(body, topic="t"))
    first, second = await outbox.retrieve(connection, 2)
    assert (first.body, second.body) == (body, body)
    assert (first.id, first.topic, first.key, first.headers, first.recorded_at) == (identity, "t", "k", headers, NOW)


def test_what_a_broker_gave_is_decoded_by_the_codec_and_its_type() -> None:
    codec = JsonCodec({"day": date})
    assert Message.from_body(b'"2024-02-29"', topic="t", headers={"type": "day"}, codec=codec).payload == date(
        2024, 2, 29
    )
    with pytest.raises(CodecError, match="the body is not JSON"):
        _ = Message.from_body(b"{", topic="t").payload
    with pytest.raises(TypeError, match="body must be bytes, not str"):
        Message.from_body("{}", topic="t")  # type: ignore[arg-type]  # the mistake


async def test_a_stored_message_equals_the_one_that_was_written(
    connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    message = a_message()
    assert await stored(connection, outbox, message) == [message]


def test_the_header_type_is_no_part_of_the_comparison() -> None:
    message = a_message()
    assert message == message.with_header("type", "orders.placed")


def test_a_message_equals_nothing_else() -> None:
    message = a_message()
    assert message != message.id
    assert message != SimpleNamespace(**{field: getattr(message, field) for field in FIELDS})


async def test_messages_with_different_ids_are_compared_without_decoding_either(
    connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    codec = Counting()
    one, two = await stored(connection, outbox, a_message(), a_message(), codec=codec)
    assert one != two
    assert codec.decoded == 0


def test_the_repr_holds_neither_payload_nor_headers() -> None:
    message = a_message(payload={"card": "4111-secret"}, headers={"authorization": "Bearer secret"})
    assert "secret" not in repr(message)
    assert repr(message) == f"Message(id={message.id}, topic='orders', key='order-1', position=None)"


async def test_the_repr_of_a_stored_message_decodes_nothing(
    connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    codec = Counting()
    [message] = await stored(connection, outbox, a_message(), codec=codec)
    assert repr(message).endswith(f"position={message.position})")
    assert codec.decoded == 0


# --- bad input at the door ------------------------------------------------------------------------------


def test_a_topic_must_not_be_empty() -> None:
    identity = uuid4()
    with pytest.raises(ValueError, match=f"^message {identity}: topic must not be empty$"):
        Message(1, topic="", id=identity)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"topic": "a\0b"}, "topic"),
        ({"key": "a\0b"}, "key"),
        ({"headers": {"a\0b": "c"}}, "a header's name"),
        ({"headers": {"name": "a\0b"}}, "header 'name'"),
    ],
    ids=str,
)
def test_text_with_nul_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    identity = uuid4()
    with pytest.raises(ValueError, match=f"^message {identity}: {field} contains NUL"):
        a_message(id=identity, **change)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"topic": "a\ud800"}, "topic"),
        ({"topic": "\ud83d\ude00"}, "topic"),  # a pair of surrogates is no character either
        ({"key": "\udfff"}, "key"),
        ({"headers": {"\udcff": "c"}}, "a header's name"),
        ({"headers": {"name": "\udcff"}}, "header 'name'"),
    ],
    ids=ascii,
)
def test_text_with_a_lone_surrogate_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    identity = uuid4()
    with pytest.raises(ValueError, match=f"^message {identity}: {field} has a lone surrogate") as caught:
        a_message(id=identity, **change)
    str(caught.value).encode()  # the message itself must be printable


@pytest.mark.parametrize("wrong", [None, b"orders", 1, 0, ["orders"]], ids=repr)
def test_a_topic_that_is_no_text_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"topic must be a str, not {type(wrong).__name__}"):
        a_message(topic=wrong)


@pytest.mark.parametrize("wrong", [b"key", 1, 0, UUID(int=7)], ids=repr)
def test_a_key_that_is_no_text_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"key must be a str, not {type(wrong).__name__}"):
        a_message(key=wrong)


@pytest.mark.parametrize(
    ("wrong", "explained"),
    [
        (None, "headers must be a mapping, not NoneType"),
        ([("a", "b")], "headers must be a mapping, not list"),
        ("a: b", "headers must be a mapping, not str"),
        ({"attempt": 1}, "header 'attempt' must be a str, not int"),
        ({"tenant": None}, "header 'tenant' must be a str, not NoneType"),
        ({"raw": b"x"}, "header 'raw' must be a str, not bytes"),
        ({1: "x"}, "a header's name must be a str, not int"),
        ({b"raw": "x"}, "a header's name must be a str, not bytes"),
    ],
    ids=repr,
)
def test_headers_that_are_no_text_are_a_type_error(wrong: Any, explained: str) -> None:
    identity = uuid4()
    with pytest.raises(TypeError, match=f"^message {identity}: {explained}$"):
        a_message(headers=wrong, id=identity)


@pytest.mark.parametrize("wrong", ["018f0000-0000-7000-8000-000000000000", 1, b"0" * 16, ""], ids=repr)
def test_an_id_that_is_no_uuid_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"id must be a uuid.UUID, not {type(wrong).__name__}"):
        a_message(id=wrong)


class NoOffset(tzinfo):
    """A time zone that does not know its offset: what has it is still naive, says Python."""

    def utcoffset(self, _: datetime | None) -> timedelta | None:
        return None

    def tzname(self, _: datetime | None) -> str | None:
        return None

    def dst(self, _: datetime | None) -> timedelta | None:
        return None


@pytest.mark.parametrize("field", ["recorded_at", "due_at"])
@pytest.mark.parametrize("zone", [None, NoOffset()], ids=["no zone", "no offset"])
def test_a_naive_time_is_refused(field: str, zone: tzinfo | None) -> None:
    identity = uuid4()
    with pytest.raises(ValueError, match=f"^message {identity}: {field} has no time zone"):
        a_message(id=identity, **{field: NOW.replace(tzinfo=zone)})


@pytest.mark.parametrize("field", ["recorded_at", "due_at"])
@pytest.mark.parametrize("wrong", [date(2031, 5, 6), 1.5, "2031-05-06T07:08:09Z", timedelta(1)], ids=repr)
def test_a_time_that_is_no_datetime_is_a_type_error(field: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"{field} must be a datetime, not {type(wrong).__name__}"):
        a_message(**{field: wrong})


def test_all_but_payload_is_given_by_name() -> None:
    with pytest.raises(TypeError):
        Message({"order": 1}, "orders")  # type: ignore[call-arg]  # the point


# --- through the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment",
    [
        NOW,
        NOW.astimezone(timezone(timedelta(hours=5, minutes=45))),
        datetime(1, 1, 1, tzinfo=UTC),
        datetime(1999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(2000, 1, 1, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, 999998, tzinfo=UTC),
        datetime.max.replace(tzinfo=UTC),
    ],
    ids=str,
)
async def test_the_time_of_recording_survives_the_table_to_the_microsecond(
    moment: datetime, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    [message] = await stored(connection, outbox, a_message(recorded_at=moment))
    assert message.recorded_at == moment
    assert message.recorded_at is message.recorded_at


async def test_the_time_of_recording_is_the_databases_unless_it_was_given(
    connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    before = await connection.fetchval("SELECT clock_timestamp()")
    messages = await stored(connection, outbox, a_message(), a_message(due_at=NOW), a_message())
    after = await connection.fetchval("SELECT clock_timestamp()")
    for message in messages:
        assert message.recorded_at is not None
        assert before <= message.recorded_at <= after


async def test_an_empty_key_is_not_the_same_as_no_key(connection: asyncpg.Connection[Any], outbox: Outbox) -> None:
    messages = await stored(connection, outbox, a_message(key=""), a_message(key=None))
    assert [message.key for message in messages] == ["", None]


@pytest.mark.parametrize("empty", ["", [], {}, None, 0, False], ids=repr)
async def test_an_empty_payload_comes_back_as_it_was(
    empty: Any, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    [message] = await stored(connection, outbox, a_message(payload=empty))
    assert message.payload == empty
    assert type(message.payload) is type(empty)


async def test_a_payload_of_20_megabytes_comes_back_as_it_was(
    connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    huge = "0123456789abcdeé" * (20 * 2**20 // 16)
    [message] = await stored(connection, outbox, Message(huge, topic="t", headers={"h": huge[:100_000]}))
    assert message.payload == huge
    assert message.headers["h"] == huge[:100_000]


async def test_an_id_of_any_version_can_be_given(connection: asyncpg.Connection[Any], outbox: Outbox) -> None:
    ids = [UUID(int=0), UUID(int=2**128 - 1), uuid4()]
    messages = await stored(connection, outbox, *(a_message(id=one) for one in ids))
    assert [message.id for message in messages] == ids
