"""The table as an object: `Outbox`, every verb of which takes the connection first."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import UUID

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from outbox._codec import Codec, JsonCodec
from outbox._errors import OutboxError, SchemaError
from outbox._message import Message
from outbox._queries import Queries
from outbox._wakeup import Wakeup

DRIVER_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what asyncpg may raise, a bare Exception, when the server dies under it
    OSError,
)
"""Everything the driver may raise when the database refuses or is gone."""

# asyncpg's classes are generic for a type checker only.
if TYPE_CHECKING:
    Connection = asyncpg.Connection[Any] | PoolConnectionProxy[Any]
    Pool = asyncpg.Pool[Any]
else:
    Connection = asyncpg.Connection | PoolConnectionProxy
    Pool = asyncpg.Pool

_NOT_THERE: Final = (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.InvalidSchemaNameError)

# Rows and bytes of one statement. The protocol allows 32,767 parameters, seven for a row, and 1 GB.
_CHUNK: Final = 4_096
_CHUNK_BYTES: Final = 64 * 1024 * 1024
_BODY: Final = 4
"""Where in a row the body is."""

_UPGRADE: Final = "upgrade asyncpg-outbox in this service"


def scripts_in(*folder: str) -> tuple[str, ...]:
    """Returns the migrations in a folder of the library, in their order."""
    # Not by importlib.resources, whose own import takes longer than all that is done here.
    return tuple(
        path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.joinpath(*folder).glob("*.sql"))
    )


_MIGRATIONS: Final = scripts_in("migrations")


def require_connection(connection: object, refused: str) -> None:
    """Raises `TypeError` for a pool, a session of SQLAlchemy or the like where one connection is needed."""
    if not hasattr(connection, "is_in_transaction"):
        remedy = "acquire one, `async with pool.acquire() as connection:`"
        raise TypeError(f"{refused}: {type(connection).__name__} is no connection of asyncpg: {remedy}")


@dataclass(frozen=True, slots=True)
class Counts:
    """How many messages there are, all read in one snapshot."""

    total: int
    """All messages that are not dead: `dispatched` and `pending` together."""
    dispatched: int
    """Those that were delivered and are kept, marked (`CommitStrategy.MARK`)."""
    pending: int
    """Those still to be delivered, `waiting` ones included."""
    waiting: int
    """Those of the pending ones that are delayed, wait for their next attempt, or are tried alone."""
    dead: int
    """The dead letters."""
    oldest: timedelta | None = field(default=None, compare=False, repr=False)
    """How long the oldest message that is due has been waiting, by the database's clock; None when none is due.

    One that is delayed, waits for its next attempt, or stands behind another of its key is not due. It grows by
    itself, and so has no part in comparisons.
    """


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was given up, with the reason."""

    message: Message
    attempts: int
    """How many deliveries failed."""
    error: str
    """The last error, in one line."""
    died_at: datetime
    behind: int | None = None
    """The position of the dead letter that parked its key: its own, or the one it was parked behind."""


class Tables:
    """What an outbox and an inbox have in common: tables of a version, which are made and upgraded.

    Args:
        table: The name of the first table.
        schema: The schema's name.
        version: The statements that keep the version.
        names: The quoted names that the scripts speak of.
        scripts: The migrations, in their order.
    """

    def __init__(
        self, table: str, schema: str, version: Queries, names: Mapping[str, str], scripts: Sequence[str]
    ) -> None:
        self.table = table
        self.schema = schema
        self._version = version
        self._names = names
        self._scripts = scripts

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.table!r}, schema={self.schema!r})"

    async def migrate(self, connection: Connection) -> int:
        """Creates or upgrades the tables, and returns the version they have now.

        All in one transaction, under a lock: several services may migrate at the same time. It changes nothing
        when there is nothing to do. Cancelled, it makes all or nothing; a connection that is not a pool's needs a
        `reset()` afterwards, since the driver may think that a transaction is still open.

        Raises:
            SchemaError: When the tables are newer than this version of the library.
            OutboxError: When the database refuses, with the driver's error as its cause.
        """
        queries = self._version
        require_connection(connection, f"{self!r} was not migrated")
        with self._surfacing("cannot migrate"):
            # The lock must come before the snapshot, which a stricter isolation would take first of all.
            isolation: Any = None if connection.is_in_transaction() else "read_committed"
            async with connection.transaction(isolation=isolation):
                await connection.execute(queries.lock_migration)
                if not await connection.fetchval(queries.schema_exists):
                    await connection.execute(queries.create_schema)
                await connection.execute(queries.create_version)
                current = await connection.fetchval(queries.current_version)
                self._refuse_newer(current)
                for version, script in enumerate(self._scripts[current:], current + 1):
                    await connection.execute(script.format(**self._names))
                    await connection.execute(queries.record_version.format(version))
        return len(self._scripts)

    def schema_sql(self) -> str:
        """Returns what `migrate` would run on an empty database, for those who run their own migrations."""
        names = self._names
        parts = [] if self.schema == "public" else [f"CREATE SCHEMA IF NOT EXISTS {self._version.schema};"]
        parts.append(f"{self._version.create_version.strip()};")
        for version, script in enumerate(self._scripts, 1):
            parts += [script.format(**names).strip(), f"{self._version.record_version.format(version)};"]
        return "\n\n".join(parts) + "\n"

    def _upgrade_sql(self) -> str:
        """Returns what `migrate` does as one statement, for whoever has another driver, or prints what he runs."""
        queries, newest = self._version, len(self._scripts)
        steps = "".join(
            f"IF applied < {version} THEN\n{script.format(**self._names).strip()}\n"
            f"{queries.record_version.format(version)};\nEND IF;\n"
            for version, script in enumerate(self._scripts, 1)
        )
        return one_statement(f"""\
{queries.lock_migration.replace("SELECT", "PERFORM", 1)};
IF NOT ({queries.schema_exists}) THEN {queries.create_schema}; END IF;
{queries.create_version.strip()};
applied := ({queries.current_version});
IF applied > {newest} THEN
    RAISE EXCEPTION 'the schema of % has version %, this library knows up to {newest}: {_UPGRADE}',
        {queries.names["outbox_text"]}, applied;
END IF;
{steps}""")

    async def check(self, connection: Connection) -> None:
        """Raises `SchemaError`, with the remedy, unless the tables are of the version this library wants."""
        with self._surfacing("cannot read the version of the schema"):
            exists = await connection.fetchval(self._version.version_exists)
            current = await connection.fetchval(self._version.current_version) if exists else 0
        self._refuse_newer(current)
        if not current:
            raise SchemaError(self._remedy("is not there"))
        if current < len(self._scripts):
            raise SchemaError(self._remedy(f"has version {current}, this library wants {len(self._scripts)}"))

    def _refuse_newer(self, current: int) -> None:
        if current > len(self._scripts):
            raise SchemaError(
                f"the schema of {self!r} has version {current}, this library knows up to {len(self._scripts)}: "
                f"{_UPGRADE}"
            )

    def _remedy(self, what: str) -> str:
        me = type(self).__name__.lower()
        return f"the schema of {self!r} {what}: run {me}.migrate(connection), or apply {me}.schema_sql()"

    @contextmanager
    def _surfacing(self, what: str) -> Iterator[None]:
        try:
            yield
        except DRIVER_ERRORS as error:
            raise self._surfaced(what, error) from error

    def _surfaced(self, what: str, error: Exception) -> OutboxError:
        if isinstance(error, _NOT_THERE):
            return SchemaError(self._remedy(f"is not there ({error})"))
        return OutboxError(f"{self!r}: {what}: {type(error).__name__}: {error}")


class Outbox(Tables):
    """The table and the codec: what a writer and a relay must agree on.

    It holds no connection and no transaction: every verb runs on the connection you give it, inside your
    transaction if one is open. An object may be used by any number of tasks at once.

    Args:
        table: The table's name, at most 49 bytes; it is quoted, so any name will do. The tables beside it have
            this name and a suffix: _waiting, _dead, _relays, _claims, _slots, _version.
        schema: The schema's name, quoted too.
        codec: How payloads become bytes.
        clock: Gives the time of recording, aware; None leaves it to the database's clock.

    Raises:
        TypeError: When the codec is a class.
        ValueError: When a name cannot be an identifier.
    """

    def __init__(
        self,
        table: str = "outbox",
        *,
        schema: str = "public",
        codec: Codec | None = None,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        if isinstance(codec, type):  # called on the class, every payload would be taken for `self`
            raise TypeError(f"codec must be an object, not its class: {codec.__name__}(…)")
        self._queries = Queries(table, schema)
        super().__init__(table, schema, self._queries, self._queries.names, _MIGRATIONS)
        self.codec: Codec = JsonCodec() if codec is None else codec
        self._clock = clock
        self._wakeup = Wakeup()

    # --- writing ----------------------------------------------------------------------------------------

    async def persist(self, connection: Connection, *messages: Message) -> None:
        """Writes messages into the table, in their order: one statement for one, one for many.

        Everything is encoded before anything is written. Unlike `OutboxDispatcher.dispatch` it does not ask for
        an open transaction: outside of one, each statement commits by itself.

        Raises:
            CodecError: When a payload cannot be encoded; nothing was written.
            SchemaError: When the table does not exist.
            OutboxError: When the database refuses, with the driver's error as its cause.
        """
        statements = self._writing(messages)
        try:  # not `_surfacing`, which takes longer to enter than all the rest
            for statement, arguments in statements:
                await connection.execute(statement, *arguments)
        except DRIVER_ERRORS as error:
            what = f"cannot write {len(messages)} message(s), the first is {messages[0].id}"
            raise self._surfaced(what, error) from error

    def _writing(self, messages: Sequence[Message]) -> Iterable[tuple[str, Sequence[Any]]]:
        """Encodes the messages, and returns the statements that write them, each with its arguments."""
        rows = [self._row(message) for message in messages]
        fresh = [row[:-1] for row in rows if row[-1] is None]
        if len(rows) == len(fresh) == 1:
            return ((self._queries.insert, fresh[0]),)
        # Delayed messages go straight to where they wait, and are never in the way of fresh ones.
        delayed = [row for row in rows if row[-1]]
        return chain(self._inserts("outbox", fresh), self._inserts("waiting", delayed))

    def _row(self, message: Message) -> tuple[Any, ...]:
        if not isinstance(message, Message):
            raise TypeError(f"only a Message can be written, not {type(message).__name__}: nothing was written")
        headers, body = message._encode(self.codec)
        recorded_at = message._recorded_at
        if recorded_at is None:
            recorded_at = message._aware("the clock's time", self._clock()) if self._clock else None
        else:
            recorded_at = message.recorded_at  # from a table it is bytes
        return message._id, message._topic, message._key, headers, body, recorded_at, message._due_at

    def _inserts(
        self, table: Literal["outbox", "waiting"], rows: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[str, Sequence[Any]]]:
        for chunk in _chunks(rows):
            # Up to 8 as they are, then four sizes for each power of two.
            step = 1 << max(0, (len(chunk) - 1).bit_length() - 3)
            size = -(-len(chunk) // step) * step
            filling = repeat(None, (size - len(chunk)) * len(chunk[0]))
            yield self._queries.insert_many(table, size), (*chain.from_iterable(chunk), *filling)

    # --- reading and settling, for relays of your own and for operators -----------------------------------

    async def retrieve(self, connection: Connection, limit: int, *, dispatched: bool = False) -> list[Message]:
        """Returns up to `limit` pending messages in the order of their positions, waiting ones included.

        It claims nothing: a relay may deliver them at the same time. With `dispatched` it returns those that were
        marked instead, each with its `dispatched_at`.
        """
        with self._surfacing("cannot retrieve"):
            if not dispatched:
                rows = await connection.fetch(self._queries.retrieve, limit)
                return [Message._stored(self.codec, *row) for row in rows]
            marked = await connection.fetch(self._queries.retrieve_dispatched, limit)
        messages = [Message._stored(self.codec, *row[:-1]) for row in marked]
        for message, row in zip(messages, marked, strict=True):
            message._dispatched_at = row["dispatched_at"]
        return messages

    async def mark_dispatched(self, connection: Connection, *messages: Message) -> None:
        """Marks retrieved messages as dispatched, at the database's time; they are kept until `cleanup`."""
        await self._settle(connection, messages, self._queries.mark, self._queries.mark_waiting)

    async def remove(self, connection: Connection, *messages: Message) -> None:
        """Deletes retrieved messages, delivered or not."""
        await self._settle(connection, messages, self._queries.remove, self._queries.remove_waiting)

    async def _settle(self, connection: Connection, messages: Sequence[Message], fresh: str, waiting: str) -> None:
        positions = listed(position_of(message) for message in messages)
        if messages:
            with self._surfacing("cannot settle"):
                async with connection.transaction():
                    await connection.execute(fresh, positions)
                    await connection.execute(waiting, positions, [message.id for message in messages])

    async def clear(self, connection: Connection) -> None:
        """Deletes every message: pending, waiting, dispatched and dead."""
        with self._surfacing("cannot clear"):
            await connection.execute(self._queries.clear)

    async def cleanup(self, connection: Connection, older_than: timedelta, limit: int) -> int:
        """Deletes up to `limit` messages that were marked as dispatched longer than this ago; returns how many."""
        with self._surfacing("cannot clean up"):
            return affected(await connection.execute(self._queries.cleanup, older_than, limit))

    async def counts(self, connection: Connection) -> Counts:
        """Counts the messages. It reads the whole table: for a dashboard, not for every request."""
        with self._surfacing("cannot count"):
            row = await connection.fetchrow(self._queries.counts)
            assert row is not None
            return Counts(**row)

    # --- dead letters -----------------------------------------------------------------------------------

    async def dead_letters(
        self, connection: Connection, ids: Iterable[UUID] | None = None, *, limit: int = 100
    ) -> list[DeadLetter]:
        """Returns up to `limit` dead letters in the order of their positions: those of these ids, or any."""
        with self._surfacing("cannot read the dead letters"):
            rows = await connection.fetch(self._queries.dead_letters, limit, None if ids is None else list(ids))
        return [
            DeadLetter(
                Message._stored(self.codec, *row[:-3]), row["attempts"], row["error"], row["died_at"], row["behind"]
            )
            for row in rows
        ]

    async def redrive(self, connection: Connection, ids: Iterable[UUID] | None = None) -> int:
        """Sends dead letters on their way again, in order: those of these ids, or all; returns how many.

        They are due at once, keep their id and position, and have all their attempts before them. One that parked
        its key takes those along that were parked behind it, and one that was parked takes all of them along.
        """
        with self._surfacing("cannot redrive"):
            return affected(await connection.execute(self._queries.redrive, None if ids is None else list(ids)))

    async def discard(self, connection: Connection, ids: Iterable[UUID]) -> int:
        """Deletes the dead letters of these ids, for ever; returns how many.

        Those that were parked behind one of them are redriven by the relay, in order.
        """
        with self._surfacing("cannot discard"):
            return affected(await connection.execute(self._queries.discard, list(ids)))


def one_statement(body: str) -> str:
    """Makes one statement of several, in quotes that no name in them has."""
    quotes = "$outbox$"
    while quotes in body:
        quotes = f"{quotes[:-1]}_$"
    return f"DO {quotes}\nDECLARE applied integer;\nBEGIN\n{body}END\n{quotes}"


def _chunks(rows: Sequence[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    chunk: list[tuple[Any, ...]] = []
    size = 0
    for row in rows:
        size += len(row[_BODY])
        if chunk and (len(chunk) == _CHUNK or size > _CHUNK_BYTES):
            yield chunk
            chunk, size = [], len(row[_BODY])
        chunk.append(row)
    if chunk:
        yield chunk


def position_of(message: Message) -> int:
    """Returns the position of a stored message."""
    if message.position is None:
        raise ValueError(f"message {message.id} has no position: only messages from retrieve() can be settled")
    return message.position


def listed(positions: Iterable[int]) -> str:
    """Returns positions as the text of an array, as the hot statements take them."""
    return "{" + ",".join(map(str, positions)) + "}"


def affected(status: str) -> int:
    """Returns how many rows a statement changed, from what the driver says of it."""
    return int(status.rpartition(" ")[2])
