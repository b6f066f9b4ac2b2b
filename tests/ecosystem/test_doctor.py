"""`outbox doctor`: each thing that may be wrong is made so, and found; and a healthy outbox has no findings."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg
import pytest

from outbox import Message, Outbox, OutboxError, SchemaError
from outbox._doctor import (  # noqa: TID251 -- the findings themselves, whatever the command line makes of them
    Finding,
    Limits,
    Patient,
    _indexes_in,
    _settings_in,
    _skewed,
    duration,
    examine,
    server,
)
from outbox.cli import main
from outbox.embedded import Server
from tests.clock import Clock
from tests.conftest import StartServer
from tests.ecosystem.test_cli import Stuck, bury, slots_owned
from tests.relay_process import relays
from tests.test_relay import Destination, running, write

pytestmark = pytest.mark.timeout(30)

AT_ONCE = timedelta(microseconds=1)
if TYPE_CHECKING:
    Connection = asyncpg.Connection[Any]
INDEXES = ["waiting_due", "waiting_crash", "waiting_lane", "waiting_head", "dead_behind"]


async def findings(connection: Connection, outbox: Outbox, **limits: timedelta) -> list[Finding]:
    """What is found, but for the durability of the server that all tests share, which has none."""
    found = await examine(connection, outbox, Limits(**limits))
    return [one for one in found if one.check != "server"]


async def only(connection: Connection, outbox: Outbox, **limits: timedelta) -> Finding:
    (finding,) = await findings(connection, outbox, **limits)
    return finding


async def remedied(connection: Connection, finding: Finding) -> None:
    """Does what the remedy says."""
    statement = finding.remedy.partition("run: ")[2]
    assert statement, finding
    await connection.execute(statement)


@pytest.fixture
def schema(outbox: Outbox) -> str:
    return f'"{outbox.schema}"'


@asynccontextmanager
async def another(dsn: str, **settings: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(dsn, server_settings=settings)
    try:
        yield connection
    finally:
        connection.terminate()


# --- healthy -----------------------------------------------------------------------------------------------


async def test_a_healthy_outbox_has_no_findings(
    own_server: StartServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await own_server()
    monkeypatch.setenv("OUTBOX_DSN", one.dsn)
    outbox = Outbox("My 'mail'")
    async with another(one.dsn) as connection, asyncpg.create_pool(one.dsn) as pool:
        await outbox.migrate(connection)
        assert await examine(connection, outbox, Limits()) == []
        await outbox.persist(connection, *(Message(n, topic="t", key=str(n)) for n in range(100)))
        destination = Destination()
        async with running(outbox, pool, destination, order="key"):
            await destination.has_accepted(100)
            assert await examine(connection, outbox, Limits()) == []
    assert await asyncio.to_thread(main, ["doctor", "--table", "My 'mail'"]) == 0
    assert capsys.readouterr().out == "nothing is wrong\n"


async def test_the_command_tells_findings_and_ends_with_1(
    outbox: Outbox, connection: Connection, dsn: str, schema: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await connection.execute(f"DROP INDEX {schema}.outbox_waiting_due")
    await connection.execute(f"ALTER TABLE {schema}.outbox_slots RESET (fillfactor)")
    arguments = ["doctor", "--dsn", dsn, "--schema", outbox.schema]
    assert await asyncio.to_thread(main, arguments) == 1
    text = capsys.readouterr().out
    assert 'problem (indexes): the index "outbox_waiting_due" is missing\n  run: CREATE INDEX CONCURRENTLY' in text
    assert "warning (settings): " in text
    assert await asyncio.to_thread(main, [*arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["level"] for one in found] == sorted(one["level"] for one in found)
    assert {"indexes", "settings", "server"} == {one["check"] for one in found}
    assert all(set(one) == {"check", "level", "what", "remedy"} for one in found)


async def test_warnings_alone_are_no_failure(own_server: StartServer, capsys: pytest.CaptureFixture[str]) -> None:
    one = await own_server(synchronous_commit="off")
    async with another(one.dsn) as connection:
        await Outbox().migrate(connection)
    assert await asyncio.to_thread(main, ["doctor", "--dsn", one.dsn]) == 0
    assert "warning (server): synchronous_commit is off" in capsys.readouterr().out


async def test_tables_that_are_missing_or_out_of_reach_are_errors(connection: Connection, outbox: Outbox) -> None:
    with pytest.raises(SchemaError):
        await examine(connection, Outbox(schema="nowhere"), Limits())
    await connection.execute(f'DROP TABLE "{outbox.schema}".outbox_dead')
    with pytest.raises(OutboxError):
        await examine(connection, outbox, Limits())


async def test_what_is_expected_is_what_the_migrations_make(connection: Connection, outbox: Outbox) -> None:
    indexes = await connection.fetch(
        "SELECT relname FROM pg_index JOIN pg_class ON oid = indexrelid "
        "WHERE NOT indisprimary AND relnamespace = to_regnamespace($1)",
        outbox.schema,
    )
    assert {name for name, _ in _indexes_in(outbox)} == {f'"{row["relname"]}"' for row in indexes}
    tables = await connection.fetch(
        "SELECT relname, reloptions FROM pg_class WHERE relkind = 'r' AND relnamespace = to_regnamespace($1)",
        outbox.schema,
    )
    made = {row["relname"].partition("_")[2] or "outbox": row["reloptions"] or [] for row in tables}
    expected = {
        kind: [f"{name}={value}" for name, value in settings.items()] for kind, settings in _settings_in(outbox).items()
    }
    assert expected | {"version": []} == made


# --- the messages and the relays ---------------------------------------------------------------------------


async def test_messages_without_a_relay(connection: Connection, outbox: Outbox, pool: asyncpg.Pool[Any]) -> None:
    await write(pool, outbox, 1, 2)
    finding = await only(connection, outbox)
    assert finding.what == "no relay is alive, and 2 message(s) are pending"


async def test_a_message_that_waits_too_long(connection: Connection, outbox: Outbox, pool: asyncpg.Pool[Any]) -> None:
    await write(pool, outbox, 1)
    stuck = Stuck()
    async with running(outbox, pool, stuck, grace=timedelta(milliseconds=50)):
        await stuck.called.wait()
        assert await findings(connection, outbox) == []
        finding = await only(connection, outbox, max_age=AT_ONCE)
        assert finding.check == "oldest"
        assert re.match(r"the oldest message that is due has been waiting for [\d.]+ s$", finding.what)


async def test_a_relay_that_was_killed_and_nobody_takes_over(
    connection: Connection, outbox: Outbox, dsn: str, schema: str, tmp_path: Path
) -> None:
    async with relays(1, dsn, outbox.schema, tmp_path / "delivered", lease=0.3) as (relay,):
        assert await findings(connection, outbox) == []
        relay.kill()
        await relay.wait()
    expired = f"SELECT until < clock_timestamp() FROM {schema}.outbox_relays"  # noqa: S608 -- our own schema
    while not await connection.fetchval(expired):  # noqa: ASYNC110 -- the time of the server has no event
        await asyncio.sleep(0.02)
    finding = await only(connection, outbox)
    assert finding.what == "1 relay(s) died, and no other has taken over what they held"


async def test_relays_of_different_orders(
    connection: Connection, outbox: Outbox, pool: asyncpg.Pool[Any], schema: str
) -> None:
    async with running(outbox, pool, Destination()), running(outbox, pool, Destination(), order="key"):
        assert await findings(connection, outbox) == []  # in a deployment it is as it should be
        await connection.execute(f"UPDATE {schema}.outbox_relays SET started_at = started_at - interval '2 minutes'")  # noqa: S608 -- our own schema
        finding = await only(connection, outbox)
        assert finding.what == "1 relay(s) stand by, since relays of another order are at work (none)"


async def test_slots_that_relays_do_not_take(connection: Connection, outbox: Outbox, schema: str) -> None:
    register = f"INSERT INTO {schema}.outbox_relays VALUES ($1, now() + $2::interval, now() - $3::interval, 'key')"  # noqa: S608 -- our own schema
    owner, minute = uuid4(), timedelta(minutes=1)
    await connection.execute(register, owner, minute, timedelta())
    assert await findings(connection, outbox) == []  # it has just begun
    await connection.execute(register, uuid4(), minute, 2 * minute)
    await connection.execute(f"UPDATE {schema}.outbox_slots SET owner = $1 WHERE slot > 2", owner)  # noqa: S608 -- as above
    finding = await only(connection, outbox)
    assert finding.what == "3 slot(s) are nobody's, though relays keep the order 'key': keys in them do not move"


async def test_slots_of_relays_that_are_gone(
    connection: Connection, outbox: Outbox, pool: asyncpg.Pool[Any], schema: str
) -> None:
    await connection.execute(f"UPDATE {schema}.outbox_slots SET owner = $1 WHERE slot < 2", uuid4())  # noqa: S608 -- our own schema
    finding = await only(connection, outbox)
    assert finding.what == "2 slot(s) belong to relays that are not there: the keys in them do not move"
    await remedied(connection, finding)
    assert await findings(connection, outbox) == []
    async with running(outbox, pool, Destination(), order="key"):
        await slots_owned(outbox, pool, 64)


async def test_dead_letters(connection: Connection, outbox: Outbox, pool: asyncpg.Pool[Any]) -> None:
    await bury(outbox, pool, Message(1, topic="t"), Message(2, topic="t"))
    finding = await only(connection, outbox)
    assert finding.what == "there are 2 dead letter(s)"


# --- the horizon -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", ["SELECT 1", "CREATE TEMPORARY TABLE scratch ()"], ids=["reading", "writing"])
async def test_a_transaction_left_open(connection: Connection, outbox: Outbox, dsn: str, statement: str) -> None:
    async with another(dsn, application_name="report\x1b") as idle:
        await idle.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await idle.execute(statement)
        pid = idle.get_server_pid()
        assert await findings(connection, outbox) == []
        finding = await only(connection, outbox, max_transaction=AT_ONCE)
        assert finding.check == "horizon"
        assert re.match(
            rf"pid {pid} \(postgres, report.*\) holds the horizon back: its transaction is open for [\d.]+ s, "
            r"idle in transaction, its last query began [\d.]+ s ago",
            finding.what,
        )
        await remedied(connection, finding)
    assert await findings(connection, outbox, max_transaction=AT_ONCE) == []


async def test_a_transaction_in_another_database_is_no_matter(
    connection: Connection, outbox: Outbox, database: str
) -> None:
    async with another(database) as idle:
        await idle.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        assert await findings(connection, outbox, max_transaction=AT_ONCE) == []


async def test_a_prepared_transaction(own_server: StartServer) -> None:
    one = await own_server(max_prepared_transactions="2")
    async with another(one.dsn) as connection:
        await Outbox().migrate(connection)
        await connection.execute("BEGIN; CREATE TABLE t (); PREPARE TRANSACTION 'Bob''s'")
        assert await findings(connection, Outbox()) == []
        finding = await only(connection, Outbox(), max_transaction=AT_ONCE)
        assert re.match(r"""postgres's prepared transaction "Bob's" is open for [\d.]+ s""", finding.what)
        await connection.execute(finding.remedy.removeprefix("run: ").partition(", or ")[0])
        assert await findings(connection, Outbox(), max_transaction=AT_ONCE) == []


async def test_a_replication_slot_that_nobody_reads(connection: Connection, outbox: Outbox) -> None:
    name = f"doctor_{uuid4().hex}"
    await connection.execute("SELECT pg_create_logical_replication_slot($1, 'pgoutput')", name)
    try:
        finding = await only(connection, outbox)
        assert finding.what.startswith(f"the logical replication slot {name!r} holds")
        await remedied(connection, finding)
        assert await findings(connection, outbox) == []
    finally:
        drop = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1"
        await connection.execute(drop, name)


# --- the tables --------------------------------------------------------------------------------------------


async def test_dead_rows(connection: Connection, outbox: Outbox, dsn: str, schema: str) -> None:
    async with another(dsn) as busy:
        await busy.execute(f"""
            INSERT INTO {schema}.outbox (id, topic, payload)
            SELECT gen_random_uuid(), 't', '' FROM generate_series(1, 50001);
            DELETE FROM {schema}.outbox""")  # noqa: S608 -- our own schema
        await busy.close()  # which tells the statistics
    while not (found := await findings(connection, outbox)):  # noqa: ASYNC110 -- the statistics have no event
        await asyncio.sleep(0.02)
    (finding,) = found
    assert finding.what == f'{schema}."outbox" has 50,001 dead rows, and 0 that live'
    await remedied(connection, finding)
    while await findings(connection, outbox):  # noqa: ASYNC110 -- as above
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("table", ["outbox", "outbox_waiting", "outbox_dead", "outbox_relays"])
async def test_autovacuum_that_is_off_for_a_table(
    connection: Connection, outbox: Outbox, schema: str, table: str
) -> None:
    await connection.execute(f"ALTER TABLE {schema}.{table} SET (autovacuum_enabled = off)")
    finding = await only(connection, outbox)
    assert (finding.level, finding.what) == ("problem", f'autovacuum is off for {schema}."{table}"')
    await remedied(connection, finding)
    assert await findings(connection, outbox) == []


@pytest.mark.parametrize("table", ["outbox", "outbox_waiting", "outbox_relays", "outbox_claims", "outbox_slots"])
async def test_settings_that_were_changed(connection: Connection, outbox: Outbox, schema: str, table: str) -> None:
    await connection.execute(
        f"ALTER TABLE {schema}.{table} SET (autovacuum_vacuum_scale_factor = 0.3); "
        f"ALTER TABLE {schema}.{table} RESET (autovacuum_vacuum_threshold)"
    )
    finding = await only(connection, outbox)
    assert finding.level == "warning"
    assert finding.what.endswith(
        "than it has: autovacuum_vacuum_scale_factor = 0.3, autovacuum_vacuum_threshold = default"
    )
    await remedied(connection, finding)
    assert await findings(connection, outbox) == []


@pytest.mark.parametrize("index", INDEXES)
async def test_an_index_that_is_missing(connection: Connection, outbox: Outbox, schema: str, index: str) -> None:
    find = "SELECT pg_get_indexdef(to_regclass($1))"
    before = await connection.fetchval(find, f"{schema}.outbox_{index}")
    await connection.execute(f"DROP INDEX {schema}.outbox_{index}")
    finding = await only(connection, outbox)
    assert finding.what == f'the index "outbox_{index}" is missing'
    await remedied(connection, finding)
    assert await connection.fetchval(find, f"{schema}.outbox_{index}") == before
    assert await findings(connection, outbox) == []


async def test_an_index_that_is_invalid(
    connection: Connection, outbox: Outbox, pool: asyncpg.Pool[Any], schema: str
) -> None:
    await bury(outbox, pool, Message(1, topic="t"), Message(2, topic="t"))
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.execute(f"CREATE UNIQUE INDEX CONCURRENTLY topics ON {schema}.outbox_dead (topic)")
    await connection.execute(f"DELETE FROM {schema}.outbox_dead")  # noqa: S608 -- our own schema
    finding = await only(connection, outbox)
    assert finding.what == 'the index "topics" is invalid'
    await remedied(connection, finding)
    assert await findings(connection, outbox) == []


async def test_a_primary_key_that_is_missing(connection: Connection, outbox: Outbox, schema: str) -> None:
    await connection.execute(f"ALTER TABLE {schema}.outbox DROP CONSTRAINT outbox_pkey")
    finding = await only(connection, outbox)
    assert finding.what == f'{schema}."outbox" has no primary key'


# --- the server --------------------------------------------------------------------------------------------


async def test_a_server_that_does_not_keep_what_it_was_told(own_server: StartServer) -> None:
    off = ("fsync", "full_page_writes", "synchronous_commit", "autovacuum", "track_counts")
    one = await own_server(**dict.fromkeys(off, "off"))
    async with another(one.dsn) as connection:
        await Outbox().migrate(connection)
        found = await examine(connection, Outbox(), Limits())
    levels = {finding.what.partition(" ")[0]: finding.level for finding in found}
    assert levels == {name: "warning" if name == "synchronous_commit" else "problem" for name in off}
    assert {finding.check for finding in found} == {"server"}


@pytest.mark.parametrize(
    ("differs", "level", "what"),
    [
        ({"version": 13}, "problem", "PostgreSQL 13 is older than 14"),
        ({"version": 19}, "warning", "PostgreSQL 19 is newer than 18"),
        ({"is_standby": True}, "problem", "this server is a standby"),
        ({"synchronous_commit": "local"}, None, None),
    ],
    ids=str,
)
async def test_a_server_of_the_wrong_kind(
    connection: Connection, outbox: Outbox, differs: dict[str, Any], level: str | None, what: str | None
) -> None:
    row = {"version": 18, "is_standby": False, **dict.fromkeys(("fsync", "full_page_writes"), "on")}
    row |= {"synchronous_commit": "on", "autovacuum": "on", "track_counts": "on"}
    patient = Patient(outbox, await outbox.counts(connection), Limits())
    assert list(server([row], patient)) == []
    found = list(server([row | differs], patient))
    assert [finding.level for finding in found] == ([level] if level else [])
    assert not what or found[0].what.startswith(what)


async def test_a_notification_queue_that_fills_up(server: Server, own_server: StartServer) -> None:
    if server.version < 17:
        pytest.skip("the queue's length is a setting since PostgreSQL 17; before it takes 8 GB")
    one = await own_server(max_notify_queue_pages="64")
    async with another(one.dsn) as connection, another(one.dsn) as deaf:
        await Outbox().migrate(connection)
        await deaf.execute("LISTEN news")
        await deaf.execute("BEGIN")
        for number in range(10):
            await connection.execute("SELECT pg_notify('news', $1)", f"{number}{'x' * 7_900}")
        finding = await only(connection, Outbox())
        assert re.match(r"the notification queue is \d+% full", finding.what)
        await deaf.execute("COMMIT")


async def test_rights_that_a_relay_misses(connection: Connection, outbox: Outbox, dsn: str, schema: str) -> None:
    role = f"clerk_{uuid4().hex}"
    await connection.execute(f"""
        CREATE ROLE {role} LOGIN;
        GRANT USAGE ON SCHEMA {schema} TO {role};
        GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role};
        GRANT SELECT ON ALL SEQUENCES IN SCHEMA {schema} TO {role};
        REVOKE UPDATE, DELETE ON {schema}.outbox FROM {role}""")  # noqa: S608 -- our own schema
    async with another(dsn.replace("postgres@", f"{role}@")) as clerk:
        finding, blind = await findings(clerk, outbox)
        assert finding.level == "problem"
        assert finding.what == f'the role {role!r} has no DELETE, UPDATE on {schema}."outbox", which a relay needs'
        assert blind.level == "warning"
        assert "cannot see the sessions of others" in blind.what
        for one in (finding, blind):
            await remedied(connection, one)
        assert await findings(clerk, outbox) == []
    await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.skipif(Clock.library() is None, reason="libfaketime is not installed")
async def test_a_clock_that_goes_wrong(own_server: StartServer) -> None:
    with TemporaryDirectory() as folder:
        clock = Clock(Path(folder) / "clock")
        clock.set(-90)
        with clock.under():
            one = await own_server()
        async with another(one.dsn) as connection:
            await Outbox().migrate(connection)
            finding = await only(connection, Outbox())
        assert re.fullmatch(r"this machine's clock is 1 min [23]\d s ahead of the database's", finding.what)


@pytest.mark.parametrize(
    ("skew", "doubt", "what"),
    [
        (2.0, 0.1, "this machine's clock is 2.0 s ahead of the database's"),
        (-90.0, 0.1, "this machine's clock is 1 min 30 s behind the database's"),
        (2.0, 1.5, None),
        (0.5, 0.1, None),
    ],
)
def test_clocks_that_differ(skew: float, doubt: float, what: str | None) -> None:
    found = list(_skewed((timedelta(seconds=skew), timedelta(seconds=doubt)), Limits()))
    assert [finding.what for finding in found] == ([what] if what else [])


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1 min 0 s"),
        (3_725, "1 h 2 min"),
        (90_000, "1 d 1 h"),
        (86_400, "1 d 0 h"),
    ],
)
def test_a_length_of_time_is_said_in_its_largest_units(seconds: float, said: str) -> None:
    assert duration(timedelta(seconds=seconds)) == said
