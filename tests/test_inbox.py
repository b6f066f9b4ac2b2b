"""`Inbox`: what was seen is not seen again, whoever asks, and when; and what was forgotten was old enough."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from outbox import (
    ExponentialBackOff,
    Inbox,
    Message,
    NotInTransactionError,
    Outbox,
    OutboxError,
    SchemaError,
)

Connection = Any  # of the driver, or of its pool

PATIENCE = 5
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


def a_message(payload: Any = 1) -> Message:
    return Message(payload, topic="orders")


@pytest.fixture
async def inbox(outbox: Outbox, connection: Connection) -> Inbox:
    """A migrated inbox, in the schema of an outbox."""
    inbox = Inbox("inbox", schema=outbox.schema)
    await inbox.migrate(connection)
    await connection.execute(f"CREATE TABLE {outbox.schema}.effects (id uuid NOT NULL)")
    return inbox


@pytest.fixture
async def other(dsn: str) -> AsyncIterator[Connection]:
    """A second connection, of another consumer."""
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close(timeout=PATIENCE)


async def accepted(connection: Connection, inbox: Inbox, message: Message | UUID) -> bool:
    """Asks the inbox in a transaction of its own, and works on what is fresh."""
    async with connection.transaction():
        if fresh := await inbox.accept(connection, message):
            identity = message.id if isinstance(message, Message) else message
            await connection.execute(f"INSERT INTO {inbox.schema}.effects VALUES ($1)", identity)  # noqa: S608 -- ours
    return fresh


async def effects(connection: Connection, inbox: Inbox) -> list[UUID]:
    rows = await connection.fetch(f"SELECT id FROM {inbox.schema}.effects")  # noqa: S608 -- our own schema
    return [row["id"] for row in rows]


async def age(connection: Connection, inbox: Inbox, by: timedelta, *messages: Message) -> None:
    """Lets time pass for what is in the inbox: for these messages, or for all."""
    ids = [message.id for message in messages]
    table = f"{inbox.schema}.{inbox.table}"
    await connection.execute(
        f"UPDATE {table} SET accepted_at = accepted_at - $1::interval WHERE $2 OR id = ANY($3)",  # noqa: S608 -- ours
        *(by, not ids, ids),
    )


async def blocked(observer: Connection, pid: int) -> None:
    """Returns when the session with this process id waits for a lock."""
    async with asyncio.timeout(PATIENCE):
        while not await observer.fetchval("SELECT cardinality(pg_blocking_pids($1)) > 0", pid):
            pass


# --- once -----------------------------------------------------------------------------------------------


async def test_the_first_time_is_fresh_and_every_other_is_a_duplicate(connection: Connection, inbox: Inbox) -> None:
    message = a_message()
    assert [await accepted(connection, inbox, message) for _ in range(3)] == [True, False, False]
    assert await effects(connection, inbox) == [message.id]


async def test_the_id_decides_and_nothing_else(connection: Connection, inbox: Inbox) -> None:
    one = a_message()
    again = Message("changed", topic="elsewhere", key="k", id=one.id)
    same_words = a_message()
    assert await accepted(connection, inbox, one)
    assert not await accepted(connection, inbox, again)
    assert await accepted(connection, inbox, same_words)


async def test_an_id_is_as_good_as_its_message(connection: Connection, inbox: Inbox) -> None:
    message = a_message()
    assert await accepted(connection, inbox, message.id)
    assert not await accepted(connection, inbox, message)
    assert not await accepted(connection, inbox, UUID(str(message.id)))


@pytest.mark.parametrize("wrong", ["0190a1b2-0000-7000-8000-000000000000", b"id", None, 1])
async def test_what_is_neither_is_refused_at_the_door(connection: Connection, inbox: Inbox, wrong: Any) -> None:
    async with connection.transaction():
        with pytest.raises(TypeError, match=type(wrong).__name__):
            await inbox.accept(connection, wrong)
        assert await inbox.accept(connection, a_message())


async def test_a_duplicate_within_the_same_transaction_is_one_too(connection: Connection, inbox: Inbox) -> None:
    message = a_message()
    async with connection.transaction():
        assert await inbox.accept(connection, message)
        assert not await inbox.accept(connection, message)


async def test_two_consumers_with_a_table_each_both_see_a_message(connection: Connection, inbox: Inbox) -> None:
    message, billing = a_message(), Inbox("billing", schema=inbox.schema)
    await billing.migrate(connection)
    for consumer in (inbox, billing):
        async with connection.transaction():
            assert await consumer.accept(connection, message)
            assert not await consumer.accept(connection, message)


# --- the transaction ------------------------------------------------------------------------------------


async def test_without_a_transaction_it_is_refused_and_nothing_is_written(connection: Connection, inbox: Inbox) -> None:
    message = a_message()
    with pytest.raises(NotInTransactionError, match=f"{message.id} was not accepted: no transaction"):
        await inbox.accept(connection, message)
    assert await accepted(connection, inbox, message)


async def test_a_closed_connection_is_told_as_such(dsn: str, inbox: Inbox) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.close()
    with pytest.raises(OutboxError, match="closed"):
        await inbox.accept(connection, a_message())


async def test_a_connection_back_in_its_pool_is_told_as_such(pool: asyncpg.Pool[Any], inbox: Inbox) -> None:
    async with pool.acquire() as connection:
        pass
    with pytest.raises(OutboxError, match="was not accepted"):
        await inbox.accept(connection, a_message())


async def test_what_was_rolled_back_was_never_seen(connection: Connection, inbox: Inbox) -> None:
    message = a_message()
    transaction = connection.transaction()
    await transaction.start()
    assert await inbox.accept(connection, message)
    await transaction.rollback()
    assert await accepted(connection, inbox, message)


async def test_what_was_rolled_back_to_a_savepoint_was_never_seen(connection: Connection, inbox: Inbox) -> None:
    kept, undone = a_message(), a_message()
    async with connection.transaction():
        assert await inbox.accept(connection, kept)
        savepoint = connection.transaction()
        await savepoint.start()
        assert await inbox.accept(connection, undone)
        await savepoint.rollback()
        assert not await inbox.accept(connection, kept)
        assert await inbox.accept(connection, undone)
    assert not await accepted(connection, inbox, undone)


async def test_a_duplicate_leaves_the_transaction_usable(connection: Connection, inbox: Inbox) -> None:
    message = a_message()
    await accepted(connection, inbox, message)
    async with connection.transaction():
        assert not await inbox.accept(connection, message)
        assert await inbox.accept(connection, a_message())


async def test_in_a_transaction_that_failed_the_error_is_the_librarys(connection: Connection, inbox: Inbox) -> None:
    message = a_message()
    transaction = connection.transaction()
    await transaction.start()
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.execute("SELECT 1 / 0")
    with pytest.raises(OutboxError, match=str(message.id)) as caught:
        await inbox.accept(connection, message)
    assert isinstance(caught.value.__cause__, asyncpg.InFailedSQLTransactionError)
    await transaction.rollback()


# --- two at once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_commits", [True, False])
@pytest.mark.parametrize("in_savepoint", [True, False])
async def test_the_second_waits_for_the_end_of_the_first(
    connection: Connection, other: Connection, pool: asyncpg.Pool[Any], inbox: Inbox, *, first_commits: bool,
    in_savepoint: bool,
) -> None:  # fmt: skip
    message = a_message()
    first = connection.transaction()
    await first.start()
    savepoint = connection.transaction()
    if in_savepoint:
        await savepoint.start()
    assert await inbox.accept(connection, message)
    second = asyncio.create_task(accepted(other, inbox, message))
    await blocked(pool, other.get_server_pid())
    assert not second.done()
    if in_savepoint:
        await (savepoint.commit() if first_commits else savepoint.rollback())
    if first_commits or not in_savepoint:
        await (first.commit() if first_commits else first.rollback())
    async with asyncio.timeout(PATIENCE):
        # To a savepoint is enough: nothing of it is left, though the first is still open.
        assert await second is not first_commits
    if in_savepoint and not first_commits:
        await first.rollback()


async def test_of_many_at_once_one_has_the_effect(pool: asyncpg.Pool[Any], inbox: Inbox) -> None:
    messages = [a_message(number) for number in range(20)]

    async def consume(message: Message) -> bool:
        async with pool.acquire() as connection:
            return await accepted(connection, inbox, message)

    async with asyncio.timeout(30):
        fresh = await asyncio.gather(*map(consume, messages * 5))
    assert sum(fresh) == len(messages)
    assert sorted(await effects(pool, inbox)) == sorted(message.id for message in messages)


async def test_a_consumer_does_not_wait_for_other_messages(
    connection: Connection, other: Connection, inbox: Inbox
) -> None:
    async with connection.transaction(), asyncio.timeout(PATIENCE):
        assert await inbox.accept(connection, a_message())
        assert await accepted(other, inbox, a_message())


@pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
async def test_with_a_snapshot_from_before_a_duplicate_is_an_error_and_then_a_duplicate(
    connection: Connection, other: Connection, inbox: Inbox, isolation: Any
) -> None:
    message = a_message()
    transaction = other.transaction(isolation=isolation)
    await transaction.start()
    await other.execute("SELECT 1")  # takes the snapshot
    assert await accepted(connection, inbox, message)
    with pytest.raises(OutboxError, match=str(message.id)) as caught:
        await inbox.accept(other, message)
    assert isinstance(caught.value.__cause__, asyncpg.SerializationError)
    await transaction.rollback()
    async with other.transaction(isolation=isolation):
        assert not await inbox.accept(other, message)


@pytest.mark.parametrize("first_commits", [True, False])
@pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
async def test_with_a_snapshot_the_second_waits_as_well(
    connection: Connection, other: Connection, pool: asyncpg.Pool[Any], inbox: Inbox, isolation: Any, *,
    first_commits: bool,
) -> None:  # fmt: skip
    message = a_message()
    first, second = connection.transaction(isolation=isolation), other.transaction(isolation=isolation)
    await first.start()
    assert await inbox.accept(connection, message)
    await second.start()
    asking = asyncio.create_task(inbox.accept(other, message))
    await blocked(pool, other.get_server_pid())
    await (first.commit() if first_commits else first.rollback())
    async with asyncio.timeout(PATIENCE):
        if first_commits:
            with pytest.raises(OutboxError, match="SerializationError"):
                await asking
            await second.rollback()
        else:
            assert await asking
            await second.commit()


async def test_a_lock_timeout_limits_the_wait(connection: Connection, other: Connection, inbox: Inbox) -> None:
    message = a_message()
    async with connection.transaction():
        assert await inbox.accept(connection, message)
        await other.execute("SET lock_timeout = '20ms'")
        with pytest.raises(OutboxError) as caught:
            await accepted(other, inbox, message)
        assert isinstance(caught.value.__cause__, asyncpg.LockNotAvailableError)
    assert not await accepted(other, inbox, message)


async def test_a_consumer_that_dies_before_its_commit_has_accepted_nothing(
    connection: Connection, other: Connection, inbox: Inbox
) -> None:
    message = a_message()
    await other.execute("BEGIN")
    assert await inbox.accept(other, message)
    other.terminate()
    async with asyncio.timeout(PATIENCE):  # waits for the server to notice
        assert await accepted(connection, inbox, message)


# --- forgetting -----------------------------------------------------------------------------------------


async def test_cleanup_forgets_the_oldest_up_to_the_limit(connection: Connection, inbox: Inbox) -> None:
    messages = [a_message(number) for number in range(6)]
    for days, message in enumerate(messages):
        await accepted(connection, inbox, message)
        await age(connection, inbox, days * DAY, message)
    assert await inbox.cleanup(connection, 2.5 * DAY, 2) == 2
    assert [await accepted(connection, inbox, message) for message in messages] == [False] * 4 + [True] * 2
    assert await inbox.cleanup(connection, 2.5 * DAY, 100) == 1
    assert await inbox.cleanup(connection, 2.5 * DAY, 100) == 0
    assert [await accepted(connection, inbox, message) for message in messages] == [False] * 3 + [True] + [False] * 2


async def test_the_age_counts_from_the_acceptance_whatever_the_id_says(connection: Connection, inbox: Inbox) -> None:
    born_long_ago = Message(1, topic="t", id=UUID("00000000-0000-7000-8000-000000000000"))
    random = Message(1, topic="t", id=uuid4())
    for message in (born_long_ago, random):
        await accepted(connection, inbox, message)
    assert await inbox.cleanup(connection, HOUR, 100) == 0
    await age(connection, inbox, 2 * HOUR, random)
    assert await inbox.cleanup(connection, HOUR, 100) == 1
    assert not await accepted(connection, inbox, born_long_ago)


async def test_what_is_younger_than_the_longest_retry_is_never_forgotten(connection: Connection, inbox: Inbox) -> None:
    with pytest.raises(ValueError, match="may come again for 1:00:00"):
        await inbox.cleanup(connection, HOUR - timedelta(microseconds=1), 100)
    assert await inbox.cleanup(connection, HOUR, 100) == 0
    patient = Inbox("inbox", schema=inbox.schema, longest_retry=7 * DAY)
    with pytest.raises(ValueError, match="7 days"):
        await patient.cleanup(connection, 6 * DAY, 100)
    assert await patient.cleanup(connection, 7 * DAY, 100) == 0


def test_the_default_longest_retry_covers_all_attempts_of_a_default_relay() -> None:
    backoff = ExponentialBackOff()
    delays: list[timedelta] = []
    while (delay := backoff(len(delays) + 1, None)) is not None:
        delays.append(delay)
    assert len(delays) == 20
    a_dispatch = timedelta(seconds=30)  # the relay's time limit, for the first attempt and each retry
    assert sum(delays, (len(delays) + 1) * a_dispatch) <= Inbox().longest_retry


@pytest.mark.parametrize("wrong", [timedelta(), -DAY])
def test_a_longest_retry_that_is_none_is_refused(wrong: timedelta) -> None:
    with pytest.raises(ValueError, match="longest_retry must be longer than zero"):
        Inbox(longest_retry=wrong)


async def test_two_cleanups_at_once_do_not_wait_for_each_other(
    connection: Connection, other: Connection, inbox: Inbox
) -> None:
    messages = [a_message(number) for number in range(4)]
    for message in messages:
        await accepted(connection, inbox, message)
    await age(connection, inbox, DAY)
    async with connection.transaction(), asyncio.timeout(PATIENCE):
        assert await inbox.cleanup(connection, HOUR, 2) == 2
        assert await inbox.cleanup(other, HOUR, 100) == 2


async def explained(connection: Connection, statement: str, *arguments: Any) -> str:
    """The plan as it was carried out."""
    plan = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", *arguments)
    return json.dumps(json.loads(plan))


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_cleanup_walks_the_index_on_the_time_and_finds_the_rows_by_their_key(
    connection: Connection, inbox: Inbox, mode: str
) -> None:
    table = f"{inbox.schema}.inbox"
    seconds = await connection.fetchval("SELECT array_agg(i) FROM generate_series(1, 20000) AS i")
    await connection.execute(
        f"INSERT INTO {table} SELECT gen_random_uuid(), now() - i * interval '1 s' FROM unnest($1::int[]) i",  # noqa: S608 -- ours
        seconds,
    )
    await connection.execute(f"ANALYZE {table}")
    await connection.execute(f"SET plan_cache_mode = {mode}")
    plan = await explained(connection, inbox._queries.cleanup, HOUR, 100)  # noqa: SLF001 -- looks at the statement
    assert "Seq Scan" not in plan
    assert '"Index Name": "inbox_accepted_at"' in plan
    assert '"Index Name": "inbox_pkey"' in plan
    assert await connection.fetchval(f"SELECT count(*) FROM {table}") == 19_900  # noqa: S608 -- our own schema


async def test_accepting_needs_the_primary_key_alone(connection: Connection, inbox: Inbox) -> None:
    plan = await explained(connection, inbox._queries.accept, uuid4())  # noqa: SLF001 -- looks at the statement
    assert '"Conflict Arbiter Indexes": ["inbox_pkey"]' in plan
    assert "Scan" not in plan


# --- the tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["inbox", 'In "quotes" and {braces} o\'clock', "ü" * 24 + "x"])
async def test_every_verb_works_under_any_name(connection: Connection, outbox: Outbox, table: str) -> None:
    inbox = Inbox(table, schema=outbox.schema)
    version = await inbox.migrate(connection)
    assert await inbox.migrate(connection) == version
    await inbox.check(connection)
    async with connection.transaction():
        assert await inbox.accept(connection, a_message())
    assert await inbox.cleanup(connection, HOUR, 1) == 0
    await outbox.check(connection)


async def test_the_script_is_as_good_as_migrating(database: str) -> None:
    for schema in ("public", "An other"):
        inbox = Inbox(schema=schema)
        empty = await asyncpg.connect(database)
        await empty.execute(inbox.schema_sql())
        await inbox.check(empty)
        assert await inbox.migrate(empty) == 1
        async with empty.transaction():
            assert await inbox.accept(empty, a_message())
        await empty.close()


async def test_without_its_table_it_names_the_remedy(connection: Connection, outbox: Outbox) -> None:
    inbox = Inbox("missing", schema=outbox.schema)
    with pytest.raises(SchemaError, match=r"inbox\.migrate\(connection\)"):
        await accepted(connection, inbox, a_message())
    with pytest.raises(SchemaError, match=r"inbox\.schema_sql\(\)"):
        await inbox.cleanup(connection, HOUR, 1)
    with pytest.raises(SchemaError, match="is not there"):
        await inbox.check(connection)


@pytest.mark.parametrize("verb", ["migrate", "check"])
async def test_a_newer_inbox_is_refused(connection: Connection, inbox: Inbox, verb: str) -> None:
    await connection.execute(f"INSERT INTO {inbox.schema}.inbox_version VALUES (1000)")  # noqa: S608 -- our own schema
    with pytest.raises(SchemaError, match="has version 1000"):
        await getattr(inbox, verb)(connection)


async def test_the_table_of_an_outbox_is_none_for_an_inbox(connection: Connection, outbox: Outbox) -> None:
    with pytest.raises(OutboxError):
        await Inbox(outbox.table, schema=outbox.schema).migrate(connection)
    await outbox.check(connection)


@pytest.mark.parametrize("name", ["", "a" * 50, "nul\0"])
def test_a_name_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Inbox(name)


async def test_a_consumer_needs_few_rights(connection: Connection, inbox: Inbox) -> None:
    role = f"consumer_{uuid4().hex}"
    await connection.execute(f"""
        CREATE ROLE {role};
        GRANT USAGE ON SCHEMA {inbox.schema} TO {role};
        GRANT INSERT ON {inbox.schema}.inbox, {inbox.schema}.effects TO {role};
        GRANT SELECT (id) ON {inbox.schema}.inbox TO {role};
        SET ROLE {role}""")
    message = a_message()
    assert await accepted(connection, inbox, message)
    assert not await accepted(connection, inbox, message)
    with pytest.raises(OutboxError, match="permission denied"):
        await inbox.cleanup(connection, HOUR, 1)
    await connection.execute("RESET ROLE")
    await connection.execute(f"GRANT SELECT, UPDATE, DELETE ON {inbox.schema}.inbox TO {role}; SET ROLE {role}")
    assert await inbox.cleanup(connection, HOUR, 1) == 0
    await connection.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")
