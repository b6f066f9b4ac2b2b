"""The tables: made by `migrate` or by hand, the same in both cases, and never by two at once."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest

from outbox import Message, Outbox, OutboxDispatcher, OutboxError, Relay, SchemaError

Connection = Any  # of the driver, or of its pool
TABLES = ["", "_claims", "_dead", "_relays", "_slots", "_version", "_waiting"]
NEWER = 1_000


class Unused:
    async def dispatch(self, *_: Message) -> None:
        raise AssertionError("there is nothing to dispatch")


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[str]:
    """The DSN of an empty database."""
    name = f"schema_{uuid4().hex}"
    connection = await asyncpg.connect(dsn)
    await connection.execute(f"CREATE DATABASE {name}")
    yield urlsplit(dsn)._replace(path=f"/{name}").geturl()
    await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await connection.close()


@pytest.fixture
async def empty(database: str) -> AsyncIterator[Connection]:
    """A connection to an empty database."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close(timeout=5)


@asynccontextmanager
async def connections(count: int, dsn: str, **settings: str) -> AsyncIterator[list[Connection]]:
    async with AsyncExitStack() as stack:
        opened = [await asyncpg.connect(dsn, server_settings=settings) for _ in range(count)]
        for connection in opened:
            stack.push_async_callback(connection.close)
        yield opened


async def versions(connection: Connection, outbox: Outbox) -> list[int]:
    table = f"{outbox.schema}.{outbox.table}_version"
    rows = await connection.fetch(f"SELECT version FROM {table} ORDER BY version")  # noqa: S608 -- our own names
    return [row["version"] for row in rows]


async def blocked(observer: Connection, pid: int) -> None:
    """Returns when the session with this process id waits for a lock."""
    async with asyncio.timeout(5):
        while not await observer.fetchval("SELECT cardinality(pg_blocking_pids($1)) > 0", pid):
            pass


RELATIONS = """
    SELECT c.relname::text, c.relkind::text, c.relpersistence::text, c.reloptions::text[], a.amname::text,
        obj_description(c.oid, 'pg_class') AS comment, t.reloptions::text[] AS toast
    FROM pg_class c LEFT JOIN pg_am a ON a.oid = c.relam LEFT JOIN pg_class t ON t.oid = c.reltoastrelid
    WHERE c.relnamespace = $1::text::regnamespace ORDER BY 1"""
COLUMNS = """
    SELECT c.relname::text, a.attnum, a.attname::text, format_type(a.atttypid, a.atttypmod), a.attnotnull,
        a.attidentity::text, a.attgenerated::text, a.attstorage::text, a.attcompression::text, a.attcollation,
        pg_get_expr(d.adbin, d.adrelid) AS default
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE c.relnamespace = $1::text::regnamespace AND a.attnum > 0 ORDER BY 1, 2"""
INDEXES = """
    SELECT c.relname::text, pg_get_indexdef(i.indexrelid), i.indisunique, i.indisprimary, i.indisvalid
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    WHERE c.relnamespace = $1::text::regnamespace ORDER BY 1"""
CONSTRAINTS = """
    SELECT conrelid::regclass::text, conname::text, contype::text, pg_get_constraintdef(oid)
    FROM pg_constraint WHERE connamespace = $1::text::regnamespace ORDER BY 1, 2"""
SEQUENCES = """
    SELECT c.relname::text, s.seqtypid::regtype::text, s.seqstart, s.seqincrement, s.seqmax, s.seqmin, s.seqcache,
        s.seqcycle, d.refobjid::regclass::text AS owner, d.refobjsubid
    FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid
        LEFT JOIN pg_depend d ON d.objid = s.seqrelid AND d.deptype IN ('i', 'a') AND d.refobjsubid > 0
    WHERE c.relnamespace = $1::text::regnamespace ORDER BY 1"""
OTHERS = """
    SELECT 'function', proname::text FROM pg_proc WHERE pronamespace = $1::text::regnamespace
    UNION ALL SELECT 'trigger', tgname::text FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
        WHERE c.relnamespace = $1::text::regnamespace
    UNION ALL SELECT 'type', typname::text FROM pg_type
        WHERE typnamespace = $1::text::regnamespace AND typtype NOT IN ('c', 'b') ORDER BY 1, 2"""


async def catalog(connection: Connection, schema: str) -> dict[str, list[tuple[Any, ...]]]:
    """All that PostgreSQL knows of what is in this schema."""
    quoted = await connection.fetchval("SELECT quote_ident($1)", schema)
    queries = {
        "relations": RELATIONS,
        "columns": COLUMNS,
        "indexes": INDEXES,
        "constraints": CONSTRAINTS,
        "sequences": SEQUENCES,
        "others": OTHERS,
    }
    return {name: [tuple(row) for row in await connection.fetch(query, quoted)] for name, query in queries.items()}


# --- migrating ------------------------------------------------------------------------------------------


async def test_migrating_makes_the_tables_and_returns_their_version(empty: Connection) -> None:
    outbox = Outbox("mail", schema="messaging")
    version = await outbox.migrate(empty)
    assert await versions(empty, outbox) == list(range(1, version + 1))
    tables = await empty.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'messaging' ORDER BY 1")
    assert [row["tablename"] for row in tables] == [f"mail{suffix}" for suffix in TABLES]


async def test_the_hot_table_has_no_index_but_its_key_and_no_trigger(connection: Connection, outbox: Outbox) -> None:
    found = await catalog(connection, outbox.schema)
    assert [row[0] for row in found["indexes"] if f"ON {outbox.schema}.outbox " in row[1]] == ["outbox_pkey"]
    assert found["others"] == []


async def test_migrating_on_a_pool_is_refused_and_the_error_says_what_to_do(pool: Any, outbox: Outbox) -> None:
    with pytest.raises(TypeError, match=r"was not migrated: Pool is no connection of asyncpg: .*pool\.acquire"):
        await outbox.migrate(pool)


@pytest.mark.parametrize("names", [{"table": object()}, {"schema": None}])
def test_a_name_that_is_no_text_is_refused(names: Any) -> None:
    with pytest.raises(TypeError, match="table and schema are names, a str each, not"):
        Outbox(**names)


async def test_migrating_a_second_time_changes_nothing(connection: Connection, outbox: Outbox) -> None:
    await outbox.persist(connection, Message(1, topic="t"))
    before = await catalog(connection, outbox.schema)
    query = f"SELECT * FROM {outbox.schema}.outbox_version"  # noqa: S608 -- our own schema
    applied = await connection.fetch(query)
    assert await outbox.migrate(connection) == len(applied)
    assert await catalog(connection, outbox.schema) == before
    assert await connection.fetch(query) == applied
    assert len(await outbox.retrieve(connection, 10)) == 1


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
async def test_eight_services_may_migrate_at_the_same_time(isolation: str, database: str) -> None:
    outbox = Outbox("mail", schema="messaging")
    async with connections(8, database, default_transaction_isolation=isolation) as opened:
        found = await asyncio.gather(*map(outbox.migrate, opened))
        assert len(set(found)) == 1
        assert await versions(opened[0], outbox) == list(range(1, found[0] + 1))
        await outbox.check(opened[0])


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
async def test_who_comes_second_waits_for_the_first_and_finds_nothing_to_do(isolation: str, database: str) -> None:
    outbox = Outbox("mail", schema="messaging")
    async with connections(3, database, default_transaction_isolation=isolation) as (first, second, observer):
        transaction = first.transaction()
        await transaction.start()
        version = await outbox.migrate(first)
        waiting = asyncio.create_task(outbox.migrate(second))
        await blocked(observer, second.get_server_pid())
        await transaction.commit()
        assert await waiting == version


async def test_two_outboxes_can_be_made_in_one_new_schema_at_the_same_time(database: str) -> None:
    one, two = Outbox("one", schema="messaging"), Outbox("two", schema="messaging")
    async with connections(3, database) as (first, second, observer):
        transaction = first.transaction()
        await transaction.start()
        await one.migrate(first)
        waiting = asyncio.create_task(two.migrate(second))
        await blocked(observer, second.get_server_pid())
        await transaction.commit()
        await waiting
        await one.check(observer)
        await two.check(observer)


async def test_migrating_is_part_of_the_transaction_around_it(empty: Connection) -> None:
    outbox = Outbox("mail", schema="messaging")
    transaction = empty.transaction()
    await transaction.start()
    await outbox.migrate(empty)
    await OutboxDispatcher(empty, outbox).dispatch(Message(1, topic="t"))
    assert len(await outbox.retrieve(empty, 10)) == 1
    await transaction.rollback()
    assert not await empty.fetchval("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'messaging')")

    async with empty.transaction():
        await outbox.migrate(empty)
        await outbox.migrate(empty)
        await OutboxDispatcher(empty, outbox).dispatch(Message(2, topic="t"))
    assert [message.payload for message in await outbox.retrieve(empty, 10)] == [2]


async def test_a_migration_that_fails_leaves_nothing_behind_and_the_transaction_around_it_usable(
    empty: Connection,
) -> None:
    await empty.execute("CREATE TABLE outbox_dead (a int)")
    before = await catalog(empty, "public")
    async with empty.transaction():
        with pytest.raises(OutboxError, match=r"Outbox\('outbox', schema='public'\): cannot migrate: .*already exists"):
            await Outbox().migrate(empty)
        assert await empty.fetchval("SELECT 1") == 1
    assert await catalog(empty, "public") == before


async def test_a_migration_without_the_right_to_it_is_our_error_with_the_drivers_as_its_cause(
    empty: Connection,
) -> None:
    role = f"nobody_{uuid4().hex}"
    await empty.execute(f"CREATE ROLE {role}; SET ROLE {role}")
    with pytest.raises(OutboxError, match=r"cannot migrate: .*permission denied") as caught:
        await Outbox(schema="messaging").migrate(empty)
    assert isinstance(caught.value.__cause__, asyncpg.InsufficientPrivilegeError)
    await empty.execute(f"RESET ROLE; DROP ROLE {role}")


async def test_migrating_needs_no_right_to_make_a_schema_that_is_there(empty: Connection) -> None:
    role = f"owner_{uuid4().hex}"
    await empty.execute(f"CREATE ROLE {role}; CREATE SCHEMA messaging AUTHORIZATION {role}; SET ROLE {role}")
    outbox = Outbox(schema="messaging")
    await outbox.migrate(empty)
    await outbox.check(empty)
    await empty.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")


async def test_the_search_path_decides_nothing(empty: Connection) -> None:
    outbox = Outbox("mail")
    await empty.execute("CREATE SCHEMA elsewhere; SET search_path = elsewhere")
    await outbox.migrate(empty)
    await outbox.persist(empty, Message(1, topic="t"))
    await outbox.check(empty)
    assert (await catalog(empty, "elsewhere"))["relations"] == []
    assert len(await outbox.retrieve(empty, 10)) == 1


async def test_the_old_rule_for_backslashes_in_strings_changes_nothing(empty: Connection) -> None:
    outbox = Outbox("a\\'b", schema="c\\'d")
    await empty.execute("SET standard_conforming_strings = off")
    await outbox.migrate(empty)
    await outbox.check(empty)
    await outbox.persist(empty, Message("\\'", topic="\\'"))
    [message] = await outbox.retrieve(empty, 1)
    assert (message.topic, message.payload) == ("\\'", "\\'")


# --- by hand --------------------------------------------------------------------------------------------

NAMES = [
    Outbox(),
    Outbox("Outgoing mail", schema="public"),
    Outbox("mail", schema="messaging"),
    Outbox('a"b', schema="c'd"),
    Outbox("pay$1day", schema="$1"),
    Outbox("%s {x} \\", schema="{}"),
    Outbox("o" * 49, schema="s" * 63),
]


@pytest.mark.parametrize("outbox", NAMES, ids=repr)
async def test_the_script_makes_exactly_what_migrating_makes(outbox: Outbox, empty: Connection) -> None:
    quoted = '"{}"'.format(outbox.schema.replace('"', '""'))
    version = await outbox.migrate(empty)
    migrated = await catalog(empty, outbox.schema)
    await empty.execute(f"DROP SCHEMA {quoted} CASCADE; CREATE SCHEMA {quoted}")
    await empty.execute(outbox.schema_sql())
    assert await catalog(empty, outbox.schema) == migrated
    await outbox.check(empty)
    assert await outbox.migrate(empty) == version
    assert await catalog(empty, outbox.schema) == migrated


@pytest.mark.parametrize("outbox", NAMES, ids=repr)
async def test_the_script_is_complete_on_an_empty_database(outbox: Outbox, empty: Connection) -> None:
    await empty.execute(outbox.schema_sql())
    await outbox.check(empty)


async def test_the_script_can_be_run_statement_by_statement(empty: Connection) -> None:
    outbox = Outbox("mail")
    for statement in re.split(r";\s*\n", outbox.schema_sql()):
        if statement.strip():
            await empty.execute(statement)
    await outbox.check(empty)


async def test_the_script_does_not_run_on_what_is_there(connection: Connection, outbox: Outbox) -> None:
    before = await catalog(connection, outbox.schema)
    with pytest.raises(asyncpg.DuplicateTableError):
        await connection.execute(outbox.schema_sql())
    assert await catalog(connection, outbox.schema) == before


# --- versions -------------------------------------------------------------------------------------------


async def test_an_outbox_that_was_migrated_is_in_order(connection: Connection, outbox: Outbox) -> None:
    await outbox.check(connection)


@pytest.mark.parametrize("outbox", [Outbox("mail"), Outbox("mail", schema="no such schema")], ids=repr)
async def test_an_outbox_that_was_never_migrated_is_refused_with_the_remedy(outbox: Outbox, empty: Connection) -> None:
    with pytest.raises(SchemaError) as caught:
        await outbox.check(empty)
    assert str(caught.value).startswith(f"the schema of {outbox!r} is not there")
    assert str(caught.value).endswith(": run outbox.migrate(connection), or apply outbox.schema_sql()")


async def set_version(connection: Connection, outbox: Outbox, version: int) -> None:
    table = f"{outbox.schema}.outbox_version"
    await connection.execute(f"DELETE FROM {table}")  # noqa: S608 -- our own name
    if version:
        await connection.execute(f"INSERT INTO {table} (version) VALUES ($1)", version)  # noqa: S608 -- our own name


async def test_an_older_outbox_is_refused_with_the_remedy(connection: Connection, outbox: Outbox) -> None:
    current = max(await versions(connection, outbox))
    await set_version(connection, outbox, current - 1)
    with pytest.raises(SchemaError, match=rf"has version {current - 1}, .* {current}: run outbox\.migrate"):
        await outbox.check(connection)


@pytest.mark.parametrize("verb", ["check", "migrate"])
async def test_a_newer_outbox_is_refused_with_the_remedy(verb: str, connection: Connection, outbox: Outbox) -> None:
    await set_version(connection, outbox, NEWER)
    before = await catalog(connection, outbox.schema)
    with pytest.raises(SchemaError, match=rf"has version {NEWER}, .*: upgrade asyncpg-outbox in this service"):
        await getattr(outbox, verb)(connection)
    assert await catalog(connection, outbox.schema) == before
    assert await versions(connection, outbox) == [NEWER]


@pytest.mark.parametrize("version", [1, NEWER], ids=["older", "newer"])
@pytest.mark.parametrize("verb", ["run", "run_once"])
async def test_a_relay_refuses_an_outbox_of_another_version(
    verb: str, version: int, connection: Connection, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await set_version(connection, outbox, version)
    with pytest.raises(SchemaError, match=f"has version {version}"):
        await getattr(Relay(outbox, pool, Unused()), verb)()


@pytest.mark.parametrize("verb", ["run", "run_once"])
async def test_a_relay_refuses_an_outbox_that_is_not_there(verb: str, pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    missing = Outbox("missing", schema=outbox.schema)
    with pytest.raises(SchemaError, match=r"run outbox\.migrate\(connection\)"):
        await getattr(Relay(missing, pool, Unused()), verb)()


async def test_a_writer_does_not_ask_for_the_version(connection: Connection, outbox: Outbox) -> None:
    # It pays for one INSERT and nothing else; services are upgraded one after the other.
    await set_version(connection, outbox, NEWER)
    async with connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(Message(1, topic="t"))
    assert len(await outbox.retrieve(connection, 10)) == 1


async def test_a_table_without_a_column_is_refused_with_the_remedy(connection: Connection, outbox: Outbox) -> None:
    await connection.execute(f'ALTER TABLE "{outbox.schema}".outbox DROP COLUMN headers')
    with pytest.raises(SchemaError, match=r"headers.*run outbox\.migrate\(connection\)") as caught:
        await outbox.persist(connection, Message(1, topic="t"))
    assert isinstance(caught.value.__cause__, asyncpg.UndefinedColumnError)
