"""What may ail an outbox: a finding for each thing that is wrong, with its remedy.

Each check is one statement and one pure function of its rows.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any, Final, Literal

import asyncpg

from outbox._errors import describe
from outbox._outbox import Connection, Counts, Outbox
from outbox._queries import SLOTS, OperatorQueries

_OLDEST_SERVER: Final = 14
_NEWEST_SERVER: Final = 18
_DEAD_ROWS: Final = 50_000
"""So many dead rows are normal between two visits of autovacuum."""
_SETTLED: Final = timedelta(minutes=1)
"""After this long relays have shared the slots, and a deployment has replaced them."""
_QUEUE_USAGE: Final = 0.05
_A_MINUTE: Final = 60

# What the migrations make, read from them.
_COMMENT: Final = re.compile(r"--.*")
_INDEX: Final = re.compile(r"CREATE INDEX {(\w+)} ON [^;]*")
_TABLE: Final = re.compile(r"CREATE TABLE {(\w+)} \([^;]*?\n\)(?: WITH \(([^;]*)\))?;")
_SETTING: Final = re.compile(r"(\w+) = ([\w.]+)")

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or may become so."""

    check: str
    level: Literal["problem", "warning"]
    """A problem keeps messages from going out, or will; a warning is for you to judge."""
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Limits:
    """From where on something is wrong."""

    max_age: timedelta = timedelta(minutes=1)
    """How long a message that is due may wait."""
    max_transaction: timedelta = timedelta(minutes=5)
    """How long a transaction may be open."""
    max_skew: timedelta = timedelta(seconds=1)
    """How far the clocks may be apart."""


@dataclass(frozen=True, slots=True)
class Patient:
    """What is known of the outbox before a check."""

    outbox: Outbox
    counts: Counts
    limits: Limits


Check = Callable[[Rows, Patient], Iterable[Finding]]


async def examine(connection: Connection, outbox: Outbox, limits: Limits) -> list[Finding]:
    """Makes every check, the most urgent first; one that the role may not make is a finding itself.

    Raises:
        SchemaError: When the tables are missing, older or newer than this version of the library.
        OutboxError: When the database refuses.
    """
    await outbox.check(connection)
    patient = Patient(outbox, await outbox.counts(connection), limits)
    findings = [*_skewed(await _skew(connection, outbox), limits)]
    queries = OperatorQueries(outbox._queries)
    for name, check in _CHECKS.items():
        try:
            findings += check(await connection.fetch(getattr(queries, name)), patient)
        except asyncpg.InsufficientPrivilegeError as error:
            remedy = "use a role that may"
            findings.append(Finding(name, "warning", f"this role may not look: {describe(error)}", remedy))
    return sorted(findings, key=lambda finding: finding.level)


async def _skew(connection: Connection, outbox: Outbox) -> tuple[timedelta, timedelta]:
    """Returns how far this machine's clock is ahead of the database's, and how far that may be wrong."""
    started = monotonic()
    theirs = await connection.fetchval(OperatorQueries(outbox._queries).now)
    ours = datetime.now(UTC)
    return ours - theirs, timedelta(seconds=monotonic() - started)


# --- the messages and the relays ----------------------------------------------------------------------------


def relays(rows: Rows, patient: Patient) -> Iterator[Finding]:
    """Looks for relays that died unnoticed, or stand by, and for messages that wait too long."""
    alive = [row for row in rows if row["lease"] > timedelta()]
    counts, max_age = patient.counts, patient.limits.max_age
    if counts.pending and not alive:
        what = f"no relay is alive, and {counts.pending:,} message(s) are pending"
        yield Finding("relays", "problem", what, "start one, with `outbox relay`")
    elif counts.oldest and counts.oldest > max_age:
        what = f"the oldest message that is due has been waiting for {duration(counts.oldest)}"
        remedy = "look into the relays' log: the destination is down or too slow, or relays are too few"
        yield Finding("oldest", "problem", what, remedy)
    if dead := len(rows) - len(alive):
        what = f"{dead} relay(s) died, and no other has taken over what they held"
        remedy = "start a relay; a living one takes over within its lease, unless the database keeps it from it"
        yield Finding("relays", "problem", what, remedy)
    idle = [row for row in alive if not row["active"] and row["age"] > _SETTLED]
    if idle:
        working = sorted({row["ordering"] for row in alive if row["active"]})
        what = f"{len(idle)} relay(s) stand by, since relays of another order are at work ({', '.join(working)})"
        yield Finding("relays", "problem", what, "give all relays of a table the same order, and end the others")


def slots(rows: Rows, patient: Patient) -> Iterator[Finding]:
    """Looks for slots that nobody owns while relays keep an order, and for those of relays that are gone."""
    if lost := [row for row in rows if row["owner"] and not row["is_known"]]:
        what = f"{len(lost)} slot(s) belong to relays that are not there: the keys in them do not move"
        remedy = f"run: {OperatorQueries(patient.outbox._queries).free_lost_slots}"
        yield Finding("slots", "problem", what, remedy)
    ordering = rows[0]["ordering"] if rows else None
    if free := [row for row in rows if ordering and not row["owner"] and row["slot"] < SLOTS[ordering]]:
        what = f"{len(free)} slot(s) are nobody's, though relays keep the order {ordering!r}: keys in them do not move"
        yield Finding("slots", "problem", what, "restart the relays one by one, and look into their log")


def dead_letters(rows: Rows, _patient: Patient) -> Iterator[Finding]:
    """Looks for dead letters."""
    if dead := rows[0]["dead"]:
        what = f"there are {dead:,} dead letter(s)"
        remedy = "`outbox dead list` shows their errors; redrive them when the reason is gone, or discard them"
        yield Finding("dead letters", "problem", what, remedy)


# --- the horizon --------------------------------------------------------------------------------------------


def open_transactions(rows: Rows, patient: Patient) -> Iterator[Finding]:
    """Looks for sessions that hold the horizon back."""
    for row in rows:
        if row["age"] and row["age"] > patient.limits.max_transaction:
            who = f"pid {row['pid']} ({row['usename']}, {row['application_name'] or 'no application name'})"
            what = (
                f"{who} holds the horizon back: its transaction is open for {duration(row['age'])}, "
                f"{row['state'] or 'streaming'}, its last query began {duration(row['query_age'])} ago"
            )
            remedy = f"end it there, or run: SELECT pg_terminate_backend({row['pid']})"
            yield Finding("horizon", "problem", what, remedy)


def prepared(rows: Rows, patient: Patient) -> Iterator[Finding]:
    """Looks for prepared transactions that nobody ends."""
    for row in rows:
        if row["age"] > patient.limits.max_transaction:
            what = f"{row['owner']}'s prepared transaction {row['gid']!r} is open for {duration(row['age'])}"
            gid = row["gid"].replace("'", "''")
            yield Finding("horizon", "problem", what, f"run: COMMIT PREPARED '{gid}', or ROLLBACK PREPARED '{gid}'")


def replication_slots(rows: Rows, _patient: Patient) -> Iterator[Finding]:
    """Looks for replication slots that nobody reads."""
    for row in rows:
        held = "the horizon" if row["holds_all"] else "the horizon of the catalogs, and the log,"
        what = f"the {row['slot_type']} replication slot {row['slot_name']!r} holds {held} back, and nobody reads it"
        remedy = f"start its reader, or run: SELECT pg_drop_replication_slot('{row['slot_name']}')"
        yield Finding("horizon", "problem", what, remedy)


# --- the tables ---------------------------------------------------------------------------------------------


def dead_rows(rows: Rows, _patient: Patient) -> Iterator[Finding]:
    """Looks for tables that are full of dead rows."""
    for row in rows:
        if row["dead"] > max(_DEAD_ROWS, row["live"]):
            what = f"{row['table_name']} has {row['dead']:,} dead rows, and {row['live']:,} that live"
            remedy = f"when nobody holds the horizon back, run: VACUUM {row['table_name']}"
            yield Finding("dead rows", "problem", what, remedy)


def options(rows: Rows, patient: Patient) -> Iterator[Finding]:
    """Compares the settings of the tables with what the migrations gave them."""
    expected = _settings_in(patient.outbox)
    for row in rows:
        table, found = row["table_name"], dict(option.split("=", 1) for option in row["options"])
        if found.get("autovacuum_enabled", "true").lower() not in {"true", "on", "yes", "1"}:
            remedy = f"run: ALTER TABLE {table} RESET (autovacuum_enabled)"
            yield Finding("settings", "problem", f"autovacuum is off for {table}", remedy)
        changed = {name: value for name, value in expected.get(row["kind"], {}).items() if found.get(name) != value}
        if changed:
            now = ", ".join(f"{name} = {found.get(name, 'default')}" for name in changed)
            wanted = ", ".join(f"{name} = {value}" for name, value in changed.items())
            what = f"the migrations gave {table} other settings than it has: {now}"
            yield Finding("settings", "warning", what, f"run: ALTER TABLE {table} SET ({wanted})")


def indexes(rows: Rows, patient: Patient) -> Iterator[Finding]:
    """Looks for indexes that are missing or invalid."""
    schema = patient.outbox._queries.schema
    present = {row["name"] for row in rows}
    for name, statement in _indexes_in(patient.outbox):
        if name not in present:
            yield Finding("indexes", "problem", f"the index {name} is missing", f"run: {statement}")
    for row in rows:
        if row["indisvalid"] is False:
            what = f"the index {row['name']} is invalid"
            yield Finding("indexes", "problem", what, f"run: REINDEX INDEX CONCURRENTLY {schema}.{row['name']}")
    keyed = {row["table_name"] for row in rows if row["indisprimary"]}
    for table in sorted({row["table_name"] for row in rows} - keyed):
        yield Finding("indexes", "problem", f"{table} has no primary key", "add it again, as `outbox schema` shows it")


def _indexes_in(outbox: Outbox) -> Iterator[tuple[str, str]]:
    """Returns the name of each index that the migrations make, with the statement."""
    for script in outbox._scripts:
        for match in _INDEX.finditer(_COMMENT.sub("", script)):
            statement = match[0].replace("CREATE INDEX", "CREATE INDEX CONCURRENTLY").format(**outbox._names)
            yield outbox._names[match[1]], statement


def _settings_in(outbox: Outbox) -> dict[str, dict[str, str]]:
    """Returns, by table, the settings that the migrations make."""
    found = {}
    for script in outbox._scripts:
        for match in _TABLE.finditer(_COMMENT.sub("", script)):
            found[match[1]] = dict(_SETTING.findall(match[2] or ""))
    return found


# --- the server ---------------------------------------------------------------------------------------------


def server(rows: Rows, _patient: Patient) -> Iterator[Finding]:
    """Looks at the version and the settings of the server."""
    row = rows[0]
    version = row["version"]
    if version < _OLDEST_SERVER:
        what = f"PostgreSQL {version} is older than {_OLDEST_SERVER}, the oldest that is supported"
        yield Finding("server", "problem", what, "upgrade the server")
    if version > _NEWEST_SERVER:
        what = f"PostgreSQL {version} is newer than {_NEWEST_SERVER}, the newest that this version was tried on"
        yield Finding("server", "warning", what, "look for a newer asyncpg-outbox")
    if row["is_standby"]:
        yield Finding("server", "problem", "this server is a standby", "connect to the primary: relays have to write")
    for setting in ("autovacuum", "track_counts"):
        if row[setting] == "off":
            what = f"{setting} is off in the whole server: nothing is vacuumed by itself"
            yield Finding("server", "problem", what, f"run: ALTER SYSTEM SET {setting} = on; SELECT pg_reload_conf()")
    yield from _durability(row)


def _durability(row: Mapping[str, Any]) -> Iterator[Finding]:
    for setting in ("fsync", "full_page_writes"):
        if row[setting] == "off":
            what = f"{setting} is off: when the machine crashes, the database may be damaged or lost"
            yield Finding("server", "problem", what, f"run: ALTER SYSTEM SET {setting} = on; SELECT pg_reload_conf()")
    if row["synchronous_commit"] == "off":
        what = "synchronous_commit is off: a crash forgets the last commits, orders and their messages alike"
        remedy = "set it to on for the roles that write; the relay turns it off by itself, where it is safe"
        yield Finding("server", "warning", what, remedy)


def notification_queue(rows: Rows, _patient: Patient) -> Iterator[Finding]:
    """Looks at how full the queue of NOTIFY is."""
    if (usage := rows[0]["usage"]) > _QUEUE_USAGE:
        what = f"the notification queue is {usage:.0%} full; when it is full, every NOTIFY fails"
        remedy = "a session that listens stays in a transaction: end it, its pid is in the server's log"
        yield Finding("notifications", "problem", what, remedy)


def missing_rights(rows: Rows, _patient: Patient) -> Iterator[Finding]:
    """Looks for rights that a relay of this role would miss."""
    for row in rows:
        what = f"the role {row['role']!r} has no {row['rights']} on {row['table_name']}, which a relay needs"
        role = row["role"].replace('"', '""')
        remedy = f'if relays use it, run: GRANT {row["rights"]} ON {row["table_name"]} TO "{role}"'
        yield Finding("privileges", "problem", what, remedy)


def sees_others(rows: Rows, _patient: Patient) -> Iterator[Finding]:
    """Looks whether this role can see the sessions of others."""
    if not rows[0]["sees_others"]:
        role = rows[0]["role"].replace('"', '""')
        what = (
            f"the role {rows[0]['role']!r} cannot see the sessions of others: who holds the horizon back is not known"
        )
        yield Finding("privileges", "warning", what, f'run: GRANT pg_read_all_stats TO "{role}"')


def _skewed(measured: tuple[timedelta, timedelta], limits: Limits) -> Iterator[Finding]:
    skew, doubt = measured
    if abs(skew) - doubt > limits.max_skew:
        direction = "ahead of" if skew > timedelta() else "behind"
        what = f"this machine's clock is {duration(abs(skew))} {direction} the database's"
        remedy = "synchronise both by NTP: due times that a writer computes count from its own clock"
        yield Finding("clock", "problem", what, remedy)


def duration(length: timedelta) -> str:
    """Says a length of time in its two largest units, as in 3 h 20 min."""
    seconds = length.total_seconds()
    if seconds < _A_MINUTE:
        return f"{seconds:.1f} s"
    left = int(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


# In the order in which their findings are told; each is named as its statement.
_CHECKS: Final[Mapping[str, Check]] = {
    check.__name__: check
    for check in (
        relays,
        slots,
        dead_letters,
        open_transactions,
        prepared,
        replication_slots,
        dead_rows,
        options,
        indexes,
        server,
        notification_queue,
        missing_rights,
        sees_others,
    )
}
