"""Payloads by name: explicitly mapped types and upcasters, never the path of a class."""

from dataclasses import dataclass
from typing import Any

import asyncpg
from pydantic import BaseModel

from outbox import JsonCodec, Message, Outbox
from outbox.testing import drain
from tests.conformance.support import write


@dataclass(frozen=True)
class OrderPlaced:
    number: int
    tags: list[str]


class OrderPaid(BaseModel):
    number: int
    cents: int


TYPES: dict[str, type] = {"orders.placed": OrderPlaced, "orders.paid": OrderPaid}


def outbox_of(outbox: Outbox, **codec: Any) -> Outbox:
    """The same table, with another codec."""
    return Outbox(schema=outbox.schema, codec=JsonCodec(**codec))


async def test_mapped_types_are_encoded_and_decoded_by_name(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    mine = outbox_of(outbox, types=TYPES)
    payloads = [OrderPlaced(1, ["gift"]), OrderPaid(number=1, cents=990), {"plain": True}]
    await write(pool, mine, *[Message(payload, topic="t") for payload in payloads])
    headers = [row[0] for row in await connection.fetch("SELECT headers FROM outbox ORDER BY position")]
    assert headers == ['{"type":"orders.placed"}', '{"type":"orders.paid"}', "{}"]
    assert [message.payload for message in await drain(mine, pool)] == payloads


async def test_unknown_names_stay_plain_dicts(pool: asyncpg.Pool, outbox: Outbox) -> None:
    await write(pool, outbox_of(outbox, types=TYPES), Message(OrderPlaced(1, []), topic="t"))
    [message] = await drain(outbox, pool)
    assert message.payload == {"number": 1, "tags": []}
    assert message.headers == {"type": "orders.placed"}


async def test_an_upcaster_makes_of_an_old_document_what_its_type_expects_today(
    pool: asyncpg.Pool, outbox: Outbox
) -> None:
    def with_tags(document: dict[str, Any]) -> dict[str, Any]:
        return {"tags": ["old"], **document}

    old = Message({"number": 1}, topic="t", headers={"type": "orders.placed"})
    await write(pool, outbox, old)
    [message] = await drain(outbox_of(outbox, types=TYPES, upcasters={"orders.placed": with_tags}), pool)
    assert message.payload == OrderPlaced(1, ["old"])


async def test_a_renamed_type_reads_its_old_name_and_writes_its_new_one(pool: asyncpg.Pool, outbox: Outbox) -> None:
    await write(pool, outbox_of(outbox, types={"placed": OrderPlaced}), Message(OrderPlaced(1, []), topic="t"))
    renamed = outbox_of(outbox, types={"orders.placed": OrderPlaced, "placed": OrderPlaced})
    await write(pool, renamed, Message(OrderPlaced(2, []), topic="t"))
    messages = await drain(renamed, pool)
    assert [message.payload for message in messages] == [OrderPlaced(1, []), OrderPlaced(2, [])]
    assert [message.headers["type"] for message in messages] == ["placed", "orders.placed"]
