"""`PsycopgDispatcher`: what OutboxDispatcher promises, in the transaction of a psycopg connection."""

from __future__ import annotations  # the drivers' classes are generic for the type checker alone

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from outbox import CodecError, Dispatcher, Message, NotInTransactionError, Outbox, OutboxError, Relay, SchemaError
from outbox.psycopg import PsycopgDispatcher

Connection = psycopg.AsyncConnection[Any]
PATIENCE = 5


def a_message(payload: Any = 1, **fields: Any) -> Message:
    return Message(payload, **({"topic": "orders"} | fields))


@pytest.fixture(params=[False, True], ids=["transactions", "autocommit"])
async def writer(dsn: str, outbox: Outbox, request: pytest.FixtureRequest) -> AsyncIterator[Connection]:
    """A psycopg connection, of either kind, and a table of orders."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=request.param) as writer:
        async with writer.transaction():
            await writer.execute(SQL("CREATE TABLE {}.orders (number bigint)").format(Identifier(outbox.schema)))
        await writer.commit()
        yield writer
        await writer.rollback()


@pytest.fixture
async def opening(dsn: str) -> AsyncIterator[Connection]:
    """A connection that opens a transaction by itself, which is psycopg's default."""
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        yield connection
        if not connection.closed:
            await connection.rollback()


@pytest.fixture
async def autocommit(dsn: str) -> AsyncIterator[Connection]:
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        yield connection


async def written(connection: Any, outbox: Outbox) -> list[Any]:
    return [message.payload for message in await outbox.retrieve(connection, 10_000)]


async def place_order(writer: Connection, outbox: Outbox, number: int) -> None:
    await writer.execute(SQL("INSERT INTO {}.orders VALUES (%s)").format(Identifier(outbox.schema)), [number])


async def orders(connection: asyncpg.Connection[Any], outbox: Outbox) -> int:
    found: int = await connection.fetchval(f"SELECT count(*) FROM {outbox.schema}.orders")  # noqa: S608 -- our own schema
    return found


# --- in the transaction ---------------------------------------------------------------------------------


async def test_it_is_a_dispatcher(opening: Connection) -> None:
    assert isinstance(PsycopgDispatcher(opening), Dispatcher)


async def test_order_and_message_commit_together(
    writer: Connection, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    async with writer.transaction():
        await place_order(writer, outbox, 1)
        await PsycopgDispatcher(writer, outbox).dispatch(a_message("placed"))
        assert await written(connection, outbox) == []
    assert await written(connection, outbox) == ["placed"]
    assert await orders(connection, outbox) == 1


async def test_order_and_message_roll_back_together(
    writer: Connection, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    async with writer.transaction(force_rollback=True):
        await place_order(writer, outbox, 1)
        await PsycopgDispatcher(writer, outbox).dispatch(a_message())
    assert await written(connection, outbox) == []
    assert await orders(connection, outbox) == 0


async def test_a_savepoint_rolled_back_takes_its_own_along(
    writer: Connection, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    dispatcher = PsycopgDispatcher(writer, outbox)
    async with writer.transaction():
        await dispatcher.dispatch(a_message("kept"))
        async with writer.transaction(force_rollback=True):
            await dispatcher.dispatch(a_message("undone"))
        await dispatcher.dispatch(a_message("kept, too"))
    assert await written(connection, outbox) == ["kept", "kept, too"]


async def test_without_autocommit_a_dispatch_opens_the_transaction_that_the_caller_ends(
    opening: Connection, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    dispatcher = PsycopgDispatcher(opening, outbox)
    await dispatcher.dispatch(a_message("undone"))
    await opening.rollback()
    await dispatcher.dispatch(a_message("kept"))
    assert await written(connection, outbox) == []
    await opening.commit()
    assert await written(connection, outbox) == ["kept"]


async def test_with_autocommit_and_no_transaction_it_is_refused_and_nothing_is_written(
    autocommit: Connection, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    message = a_message()
    with pytest.raises(NotInTransactionError, match=f"{message.id} was not written: no transaction"):
        await PsycopgDispatcher(autocommit, outbox).dispatch(message)
    assert await written(connection, outbox) == []


async def test_with_autocommit_in_a_pipeline_it_is_refused_since_nobody_can_see_the_transaction(
    autocommit: Connection, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    async with autocommit.pipeline():
        with pytest.raises(NotInTransactionError, match="pipeline"):
            await PsycopgDispatcher(autocommit, outbox).dispatch(a_message())
    assert await written(connection, outbox) == []


async def test_without_autocommit_it_works_in_a_pipeline(
    opening: Connection, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    async with opening.transaction(), opening.pipeline():
        await PsycopgDispatcher(opening, outbox).dispatch(a_message("a"))
        await PsycopgDispatcher(opening, outbox).dispatch(a_message("b"), a_message("c"))
    assert await written(connection, outbox) == ["a", "b", "c"]


async def test_without_messages_it_does_nothing(autocommit: Connection, outbox: Outbox) -> None:
    await PsycopgDispatcher(autocommit, outbox).dispatch()


# --- what is written ------------------------------------------------------------------------------------


async def test_a_message_is_what_asyncpg_would_have_written(
    opening: Connection, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    born = datetime(2031, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
    messages = [
        a_message({"a": [1, None, "ü"]}, key="k%s $1", headers={"h": "v%", "ü": "'\\"}, recorded_at=born),
        a_message(),
    ]
    for batch in (messages[:1], messages):
        async with connection.transaction():
            await outbox.persist(connection, *batch)
        await PsycopgDispatcher(opening, outbox).dispatch(*batch)
        await opening.commit()
        rows = await connection.fetch(
            f"SELECT id, topic, key, headers, payload, recorded_at FROM {outbox.schema}.outbox ORDER BY position"  # noqa: S608 -- ours
        )
        half = len(rows) // 2
        assert rows[0] == rows[half]
        assert [tuple(row)[:-1] for row in rows[:half]] == [tuple(row)[:-1] for row in rows[half:]]
        await outbox.clear(connection)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 100, 4_097])
async def test_any_number_is_written_in_order(
    opening: Connection, connection: asyncpg.Connection[Any], outbox: Outbox, count: int
) -> None:
    for _ in range(2):
        await PsycopgDispatcher(opening, outbox).dispatch(*map(a_message, range(count)))
    await opening.commit()
    assert await written(connection, outbox) == [*range(count), *range(count)]


async def test_the_clock_is_the_databases(
    opening: Connection, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    before = await connection.fetchval("SELECT clock_timestamp()")
    await PsycopgDispatcher(opening, outbox).dispatch(a_message())
    await PsycopgDispatcher(opening, outbox).dispatch(a_message(), a_message())
    await opening.commit()
    after = await connection.fetchval("SELECT clock_timestamp()")
    for message in await outbox.retrieve(connection, 3):
        assert message.recorded_at
        assert before < message.recorded_at < after


async def test_a_delayed_message_waits(
    opening: Connection, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    later = datetime.now(UTC) + timedelta(days=1)
    await PsycopgDispatcher(opening, outbox).dispatch(a_message(1, due_at=later), a_message(2), a_message(3))
    await opening.commit()
    counts = await outbox.counts(connection)
    assert (counts.pending, counts.waiting) == (3, 1)


async def test_decorators_apply_in_their_order(
    opening: Connection, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    decorators = [lambda one: one.with_header("a", "1"), lambda one: one.with_header("a", one.headers["a"] + "2")]
    await PsycopgDispatcher(opening, outbox, decorators=decorators).dispatch(a_message())
    await opening.commit()
    [message] = await outbox.retrieve(connection, 1)
    assert message.headers == {"a": "12"}


async def test_whatever_the_callers_cursors_and_rows_are(
    dsn: str, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    factories: dict[str, Any] = {"cursor_factory": psycopg.AsyncClientCursor, "row_factory": psycopg.rows.dict_row}
    async with await psycopg.AsyncConnection.connect(dsn, **factories) as writer:
        await PsycopgDispatcher(writer, outbox).dispatch(a_message("100% $1"))
    assert await written(connection, outbox) == ["100% $1"]


async def test_a_relay_delivers_it(opening: Connection, pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    delivered: list[Message] = []

    class Destination:
        async def dispatch(self, *messages: Message) -> None:
            delivered.extend(messages)

    message = a_message({"order": 1}, key="k")
    await PsycopgDispatcher(opening, outbox).dispatch(message)
    await opening.commit()
    async with asyncio.timeout(PATIENCE):
        assert await Relay(outbox, pool, Destination()).run_once() == 1
    assert delivered == [message]


# --- errors ---------------------------------------------------------------------------------------------


async def test_what_cannot_be_encoded_leaves_the_transaction_unharmed(
    opening: Connection, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    dispatcher = PsycopgDispatcher(opening, outbox)
    await dispatcher.dispatch(a_message("kept"))
    with pytest.raises(CodecError):
        await dispatcher.dispatch(a_message("not"), a_message(object()))
    await opening.commit()
    assert await written(connection, outbox) == ["kept"]


async def test_without_its_table_it_names_the_remedy(opening: Connection, outbox: Outbox) -> None:
    missing = Outbox("missing", schema=outbox.schema)
    with pytest.raises(SchemaError, match=r"outbox\.migrate\(connection\)"):
        await PsycopgDispatcher(opening, missing).dispatch(a_message())


async def test_an_error_of_the_database_is_the_librarys_and_keeps_its_cause(
    opening: Connection, outbox: Outbox
) -> None:
    message = a_message()
    with pytest.raises(psycopg.errors.DivisionByZero):
        await opening.execute("SELECT 1 / 0")
    with pytest.raises(OutboxError, match=str(message.id)) as caught:
        await PsycopgDispatcher(opening, outbox).dispatch(message)
    assert isinstance(caught.value.__cause__, psycopg.errors.InFailedSqlTransaction)


async def test_a_closed_connection_is_told_as_such(dsn: str, outbox: Outbox) -> None:
    connection = await psycopg.AsyncConnection.connect(dsn)
    await connection.close()
    with pytest.raises(OutboxError, match="closed"):
        await PsycopgDispatcher(connection, outbox).dispatch(a_message())


async def test_a_connection_that_the_server_ended_is_an_error(
    opening: Connection, connection: asyncpg.Connection[Any], outbox: Outbox
) -> None:
    await opening.execute("SELECT 1")
    await connection.fetchval("SELECT pg_terminate_backend($1, 5000)", opening.info.backend_pid)
    for reason in ("terminating connection", "closed"):
        with pytest.raises(OutboxError, match=reason):
            await PsycopgDispatcher(opening, outbox).dispatch(a_message())
