"""The contract with Debezium and its like: what they find in the outbox through logical replication.

No Debezium runs here. A replication slot with `pgoutput`, the plugin it uses, is read over plain SQL and decoded by the
few lines below (PostgreSQL's documentation, "Logical Replication Message Formats"). What is found is compared with
the configuration that `docs/how-to/debezium.md` gives.
"""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from outbox import CommitStrategy, Message, Outbox, OutboxDispatcher, Relay

PAGE = (Path(__file__).parents[2] / "docs/how-to/debezium.md").read_text(encoding="utf-8")
UUID_OID, TEXT_OID, BYTEA_OID, TIMESTAMPTZ_OID, BIGINT_OID = 2950, 25, 17, 1184, 20
ROUTER = "transforms.outbox."
SLOT = "outbox_debezium"

# What the router reads a column as, in its source: the id and the key as they are, the payload as bytes for
# BinaryDataConverter, the route as a string. Of the types in the table, only these become one.
WANTED = {
    "table.field.event.id": UUID_OID,
    "table.field.event.key": TEXT_OID,
    "table.field.event.payload": BYTEA_OID,
    "route.by.field": TEXT_OID,
}


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def properties() -> dict[str, str]:
    [block] = fenced("properties")
    return dict(line.split("=", 1) for line in block.splitlines() if line)


def router() -> dict[str, str]:
    return {name.removeprefix(ROUTER): value for name, value in properties().items() if name.startswith(ROUTER)}


def placed() -> dict[str, str]:
    """The additional columns, and where each goes."""
    return dict(item.split(":", 1) for item in router()["table.fields.additional.placement"].split(","))


# --- a reader of pgoutput ---------------------------------------------------------------------------------


class Reader:
    """Reads the fields of one message, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def bytes(self, count: int) -> bytes:
        self._at += count
        assert self._at <= len(self._data)
        return self._data[self._at - count : self._at]

    def integer(self, size: int) -> int:
        return int.from_bytes(self.bytes(size))

    def text(self) -> str:
        return self.bytes(self._data.index(0, self._at) - self._at + 1)[:-1].decode()


@dataclass
class Relation:
    """A table as it is announced before its first row."""

    schema: str
    name: str
    identity: str
    columns: dict[str, int]
    """The type of each, by name, in their order."""
    key: list[str]


@dataclass
class Changes:
    """What a slot had to tell."""

    relations: dict[int, Relation] = field(default_factory=dict)
    inserted: list[dict[str, str | None]] = field(default_factory=list)
    kinds: str = ""
    """The kinds of messages, in their order."""

    def read(self, data: bytes) -> None:
        reader = Reader(data)
        kind = reader.bytes(1).decode()
        self.kinds += kind
        if kind == "R":
            oid = reader.integer(4)
            self.relations[oid] = self._relation(reader)
        elif kind == "I":
            relation = self.relations[reader.integer(4)]
            assert reader.bytes(1) == b"N"
            assert reader.integer(2) == len(relation.columns)
            self.inserted.append({name: self._value(reader) for name in relation.columns})

    @staticmethod
    def _relation(reader: Reader) -> Relation:
        relation = Relation(reader.text(), reader.text(), reader.bytes(1).decode(), {}, [])
        for _ in range(reader.integer(2)):
            is_key, name = reader.integer(1) == 1, reader.text()
            relation.columns[name] = reader.integer(4)
            reader.integer(4)  # the type's modifier
            relation.key += [name] * is_key
        return relation

    @staticmethod
    def _value(reader: Reader) -> str | None:
        match reader.bytes(1):
            case b"n":
                return None
            case b"t":
                return reader.bytes(reader.integer(4)).decode()
            case other:
                raise AssertionError(f"a value that was not sent: {other!r}")


# --- the table under it -----------------------------------------------------------------------------------


@pytest.fixture
async def session(database: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A database with an outbox, and the publication and the slot that the page asks for."""
    session = await asyncpg.connect(database)
    await Outbox().migrate(session)
    await session.execute("SET timezone = 'UTC'; SET bytea_output = 'hex'")
    await session.execute(fenced("sql")[0])
    await session.execute("SELECT pg_create_logical_replication_slot($1, $2)", SLOT, properties()["plugin.name"])
    try:
        yield session
    finally:
        await session.execute("SELECT pg_drop_replication_slot($1)", SLOT)
        await session.execute(f"DROP PUBLICATION {properties()['publication.name']}")
        await session.close(timeout=5)


async def changes(session: asyncpg.Connection[Any]) -> Changes:
    """All that was committed since the last time."""
    async with asyncio.timeout(30):
        rows = await session.fetch(
            "SELECT data FROM pg_logical_slot_get_binary_changes($1, NULL, NULL, "
            "'proto_version', '1', 'publication_names', $2)",
            *(SLOT, properties()["publication.name"]),
        )
    found = Changes()
    for row in rows:
        found.read(row["data"])
    return found


async def dispatch(session: asyncpg.Connection[Any], *messages: Message) -> None:
    async with session.transaction():
        await OutboxDispatcher(session).dispatch(*messages)


# --- the contract -----------------------------------------------------------------------------------------


async def test_the_table_is_the_one_that_the_page_captures(session: asyncpg.Connection[Any]) -> None:
    await dispatch(session, Message(1, topic="t"))
    [relation] = (await changes(session)).relations.values()
    assert f"{relation.schema}.{relation.name}" == properties()["table.include.list"]
    assert (relation.identity, relation.key) == ("d", ["position"])


async def test_the_columns_have_the_names_and_types_of_the_contract(session: asyncpg.Connection[Any]) -> None:
    await dispatch(session, Message(1, topic="t"))
    [relation] = (await changes(session)).relations.values()
    # More columns do no harm: a row is read by name.
    assert relation.columns.items() >= {
        ("position", BIGINT_OID),
        ("id", UUID_OID),
        ("topic", TEXT_OID),
        ("key", TEXT_OID),
        ("headers", TEXT_OID),
        ("payload", BYTEA_OID),
        ("recorded_at", TIMESTAMPTZ_OID),
        ("dispatched_at", TIMESTAMPTZ_OID),
    }


async def test_the_configuration_names_only_columns_that_are_there_and_of_a_type_that_is_understood(
    session: asyncpg.Connection[Any],
) -> None:
    await dispatch(session, Message(1, topic="t"))
    [relation] = (await changes(session)).relations.values()
    named = {option: router()[option] for option in WANTED}
    assert {option: relation.columns.get(column) for option, column in named.items()} == WANTED
    assert {column: relation.columns.get(column) for column in placed()} == {
        "headers": TEXT_OID,
        "recorded_at": TIMESTAMPTZ_OID,
    }
    # A timestamptz arrives as text there, and the router stops at it.
    assert "table.field.event.timestamp" not in router()
    columns = {value for option, value in router().items() if ".field" in option and "fields" not in option}
    assert columns == set(named.values())


def test_the_page_describes_the_columns_as_the_configuration_uses_them() -> None:
    rows = re.findall(r"^\| (.+?) \| `(\w+)` \| `(\w+)` \|", PAGE, re.MULTILINE)
    types = {"uuid": UUID_OID, "text": TEXT_OID, "bytea": BYTEA_OID, "timestamptz": TIMESTAMPTZ_OID}
    described = {place: (column, types[kind]) for place, column, kind in rows}
    places = {
        "table.field.event.id": "header `id`",
        "route.by.field": "topic",
        "table.field.event.key": "key",
        "table.field.event.payload": "value",
    }
    assert described == {places[option]: (router()[option], oid) for option, oid in WANTED.items()} | {
        f"header `{column}`": (column, oid)
        for column, oid in {"headers": TEXT_OID, "recorded_at": TIMESTAMPTZ_OID}.items()
    }
    assert set(placed().values()) == {"header"}


async def test_a_message_arrives_as_it_was_dispatched(session: asyncpg.Connection[Any]) -> None:
    born = datetime(2031, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
    message = Message({"ü": [1, None]}, topic="orders.placed", key="k", headers={"h": "ü"}, recorded_at=born)
    await dispatch(session, message)
    [row] = (await changes(session)).inserted
    assert UUID(row["id"]) == message.id
    assert (row["topic"], row["key"], row["headers"]) == ("orders.placed", "k", '{"h":"ü"}')
    assert bytes.fromhex((row["payload"] or "").removeprefix("\\x")) == message.body
    assert datetime.fromisoformat(row["recorded_at"] or "") == born
    assert row["dispatched_at"] is None


async def test_without_a_key_or_headers_there_is_null_and_an_empty_object(session: asyncpg.Connection[Any]) -> None:
    await dispatch(session, Message(1, topic="t"))
    [row] = (await changes(session)).inserted
    assert (row["key"], row["headers"]) == (None, "{}")


async def test_a_large_body_arrives_whole(session: asyncpg.Connection[Any]) -> None:
    message = Message("x" * 1_000_000, topic="t")
    await dispatch(session, message)
    [row] = (await changes(session)).inserted
    assert bytes.fromhex((row["payload"] or "").removeprefix("\\x")) == message.body


async def test_what_was_rolled_back_does_not_arrive_and_the_rest_in_the_order_of_the_commits(
    database: str, session: asyncpg.Connection[Any]
) -> None:
    late = await asyncpg.connect(database)
    transaction = late.transaction()
    await transaction.start()
    await OutboxDispatcher(late).dispatch(Message(1, topic="late"))
    await dispatch(session, Message(2, topic="first"), Message(3, topic="second"))
    undone = session.transaction()
    await undone.start()
    await OutboxDispatcher(session).dispatch(Message(4, topic="undone"))
    await undone.rollback()
    await transaction.commit()
    await late.close(timeout=5)
    assert [row["topic"] for row in (await changes(session)).inserted] == ["first", "second", "late"]


async def test_a_delayed_message_does_not_arrive(session: asyncpg.Connection[Any]) -> None:
    later = datetime.now(UTC) + timedelta(days=1)
    await dispatch(session, Message(1, topic="t", due_at=later), Message(2, topic="fresh"))
    assert [row["topic"] for row in (await changes(session)).inserted] == ["fresh"]


async def test_deleting_and_marking_do_not_arrive(database: str, session: asyncpg.Connection[Any]) -> None:
    class Destination:
        async def dispatch(self, *messages: Message) -> None:
            pass

    await dispatch(session, Message(1, topic="t"), Message(2, topic="t"))
    await changes(session)
    async with asyncpg.create_pool(database, min_size=2, max_size=2) as pool, asyncio.timeout(30):
        assert await Relay(Outbox(), pool, Destination(), commit=CommitStrategy.MARK).run_once() == 2
    await session.execute("DELETE FROM outbox")
    assert set((await changes(session)).kinds) <= set("BC")


async def test_a_message_that_is_deleted_by_its_own_transaction_arrives(session: asyncpg.Connection[Any]) -> None:
    async with session.transaction():
        await OutboxDispatcher(session).dispatch(Message(1, topic="t"))
        assert await session.execute("DELETE FROM outbox") == "DELETE 1"
    assert [row["topic"] for row in (await changes(session)).inserted] == ["t"]
