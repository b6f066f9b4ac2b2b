"""For services on SQLAlchemy: a writer in their session's transaction, and the tables in their `MetaData`.

The engine is one on asyncpg. The relay needs no SQLAlchemy: it stays on a pool of asyncpg.
"""

from collections.abc import Iterable
from typing import Any, Final

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from outbox._dispatcher import Decorator
from outbox._errors import NotInTransactionError, OutboxError, SchemaError, needs
from outbox._inbox import Inbox
from outbox._message import Message
from outbox._outbox import DRIVER_ERRORS, Outbox, Tables, one_statement

with needs("sqlalchemy"):
    from sqlalchemy import (
        ARRAY,
        DDL,
        BigInteger,
        Boolean,
        CheckConstraint,
        Column,
        Connection,
        DateTime,
        Dialect,
        Identity,
        Index,
        Integer,
        LargeBinary,
        MetaData,
        PoolProxiedConnection,
        SmallInteger,
        Table,
        Text,
        Uuid,
        event,
        text,
    )
    from sqlalchemy.exc import PendingRollbackError, SQLAlchemyError, StatementError
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
    from sqlalchemy.schema import DropTable, SchemaItem, conv

_INSIDE: Final = "Dispatch inside `async with session.begin():`, together with the rows the message speaks of"
_LONGEST_IDENTIFIER: Final = 63
_TIME: Final = DateTime(timezone=True)
_NOW: Final = text("clock_timestamp()")
KEPT_AS: Final = "asyncpg-outbox"
"""Where in `MetaData.info` the outboxes and inboxes are whose tables are in it."""


class SQLAlchemyDispatcher:
    """Writes messages into the outbox, inside the transaction of a SQLAlchemy session or connection.

    They are delivered if and only if that transaction commits; a savepoint rolled back takes its own along.
    It is cheap: make one for each request. The INSERT goes through SQLAlchemy, which so logs it, begins the
    database's transaction if this is its first statement, and notices when the connection is lost. It flushes
    nothing: objects that are still pending in the session commit together with the message all the same.

    Args:
        session: An `AsyncSession`, `async_scoped_session` or `AsyncConnection` of an engine on asyncpg. Its transaction
            must have begun: by `begin()`, a statement, or an object added to the session.
        outbox: The table and codec.
        decorators: Applied to each message in this order, the result of one going into the next.

    Raises:
        TypeError: When the session is none of these.
    """

    def __init__(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        outbox: Outbox = Outbox(),  # noqa: B008 -- one for all: it has no state but who wants to be woken
        *,
        decorators: Iterable[Decorator] = (),
    ) -> None:
        given: object = session
        if not isinstance(given, AsyncSession | async_scoped_session | AsyncConnection):
            raise TypeError(
                f"session must be an AsyncSession, async_scoped_session or AsyncConnection, not {type(given).__name__}"
            )
        self._session = session
        self._outbox = outbox
        self._decorators = tuple(decorators)

    async def dispatch(self, *messages: Message) -> None:
        """Writes the messages in their order: one statement for one, one for many.

        Raises:
            NotInTransactionError: When no transaction has begun, it was rolled back, or each statement commits by
                itself (AUTOCOMMIT); nothing was written.
            CodecError: When a payload cannot be encoded; nothing was written and the transaction is unharmed.
            SchemaError: When the table does not exist.
            OutboxError: When the database refuses, with asyncpg's error as its cause: roll back, as after any error of
                the database. Or when the session is not on asyncpg, or gives no connection.
        """
        if not messages:
            return
        connection, driver = await self._connect(f"message {messages[0].id} was not written")
        for decorate in self._decorators:
            messages = tuple(map(decorate, messages))
        statements = self._outbox._writing(messages)
        with self._outbox._surfacing(f"cannot write {len(messages)} message(s), the first is {messages[0].id}"):
            for statement, arguments in statements:
                await _execute(connection, statement, arguments)
        # Not before: the COMMIT of the transaction before this one may still be about to be told.
        self._outbox._wakeup.wrote(driver)

    async def _connect(self, refused: str) -> tuple[AsyncConnection, Any]:
        """Returns the connection and asyncpg's inside it, unless what it writes would not be in a transaction."""
        try:
            session = self._session() if isinstance(self._session, async_scoped_session) else self._session
            if not session.in_transaction():
                kind = type(session).__name__
                raise NotInTransactionError(f"{refused}: no transaction has begun on this {kind}. {_INSIDE}")
            connection = await session.connection() if isinstance(session, AsyncSession) else session
            pooled = await connection.get_raw_connection()
        except PendingRollbackError as error:
            raise NotInTransactionError(f"{refused}: the transaction of this session is over. {error}") from error
        except (SQLAlchemyError, *DRIVER_ERRORS) as error:
            raise OutboxError(f"{refused}: {type(error).__name__}: {error}") from error
        _require_asyncpg(pooled, connection.dialect, refused)
        return connection, pooled.driver_connection


def _require_asyncpg(pooled: PoolProxiedConnection, dialect: Dialect, refused: str) -> None:
    if not isinstance(pooled.driver_connection, asyncpg.Connection | PoolConnectionProxy):
        engine = f"{dialect.name}+{dialect.driver}"
        raise OutboxError(f"{refused}: the engine is on {engine}. It must be on postgresql+asyncpg")
    adapted: Any = pooled.dbapi_connection
    if adapted.autocommit:
        raise NotInTransactionError(f"{refused}: with isolation level AUTOCOMMIT each statement commits by itself")


async def _execute(connection: AsyncConnection, statement: str, arguments: Iterable[Any]) -> None:
    """Executes a statement of ours through SQLAlchemy, and raises the driver's own error."""
    cause: BaseException | None = None
    try:
        # With stream_results there would be a cursor, and nothing executed until somebody fetches from it.
        await connection.exec_driver_sql(
            statement, tuple(arguments), execution_options={"stream_results": False, "yield_per": None}
        )
    except StatementError as error:
        cause = (error.orig and error.orig.__cause__) or error.orig or error
    if cause is not None:  # out here, since each of the three errors has the next as its cause, and none itself
        raise cause


# --- the tables -----------------------------------------------------------------------------------------


def outbox_tables(outbox: Outbox, metadata: MetaData) -> dict[str, Table]:
    """Adds the tables of an outbox to a `MetaData`, as its newest migration leaves them.

    Alembic's autogenerate then finds them where they belong, and with `outbox.alembic` it writes their migrations.
    `metadata.create_all` makes them as `outbox.migrate` does, or raises `SchemaError` where they are there in part.

    Args:
        outbox: Whose tables.
        metadata: Where to add them, for instance `Base.metadata`.

    Returns:
        The tables by what they hold: `outbox`, `waiting`, `dead`, `relays`, `claims`, `slots` and `version`.
    """
    return _add(outbox, metadata, _of_outbox(outbox.table))


def inbox_tables(inbox: Inbox, metadata: MetaData) -> dict[str, Table]:
    """Adds the tables of an inbox to a `MetaData`, as `outbox_tables` does those of an outbox.

    Returns:
        The tables by what they hold: `inbox` and `version`.
    """
    return _add(inbox, metadata, _of_inbox(inbox.table))


def _of_outbox(table: str) -> dict[str, list[SchemaItem]]:
    """Returns what is in each table of an outbox, the last migration included."""
    waiting, dead = f"{table}_waiting", f"{table}_dead"
    return {
        "outbox": [
            Column("position", BigInteger, Identity(), primary_key=True),
            *_message(),
            Column("dispatched_at", _TIME),
        ],
        "waiting": [
            Column("position", BigInteger, primary_key=True),
            *_message(),
            Column("due_at", _TIME, nullable=False),
            Column("attempts", Integer, nullable=False, server_default=text("0")),
            Column("suspect", Text),
            Column("owner", Uuid),
            Column("error", Text),
            Column("lane", BigInteger),
            _check(waiting, "suspect", "suspect IN ('batch', 'crash')"),
            _index(f"{waiting}_due", "due_at", "position"),
            _index(f"{waiting}_crash", "due_at", "position", where="suspect = 'crash'"),
            _index(f"{waiting}_lane", "lane", "position", where="lane IS NOT NULL"),
            _index(f"{waiting}_head", "due_at", "position", where="lane IS NOT NULL"),
        ],
        "dead": [
            Column("position", BigInteger, primary_key=True, autoincrement=False),
            *_message(defaults=False),
            Column("attempts", Integer, nullable=False),
            Column("error", Text, nullable=False),
            Column("died_at", _TIME, nullable=False, server_default=_NOW),
            Column("lane", BigInteger),
            Column("behind", BigInteger),
            _index(f"{dead}_behind", "behind", where="behind IS NOT NULL"),
        ],
        "relays": [
            Column("owner", Uuid, primary_key=True),
            Column("until", _TIME, nullable=False),
            Column("started_at", _TIME, nullable=False, server_default=_NOW),
            Column("ordering", Text, nullable=False, server_default=text("'none'::text")),
            Column("active", Boolean, nullable=False, server_default=text("true")),
            _check(f"{table}_relays", "ordering", "ordering IN ('none', 'key', 'total')"),
        ],
        "claims": [
            Column("upto", BigInteger, primary_key=True, autoincrement=False),
            Column("owner", Uuid, primary_key=True),
            Column("positions", ARRAY(BigInteger), nullable=False),
        ],
        "slots": [
            Column("slot", SmallInteger, primary_key=True, autoincrement=False),
            Column("owner", Uuid),
            Column("epoch", BigInteger, nullable=False, server_default=text("0")),
            Column("suspect_upto", BigInteger, nullable=False, server_default=text(f"'{-(2**63)}'::bigint")),
        ],
        "version": _version(),
    }


def _of_inbox(table: str) -> dict[str, list[SchemaItem]]:
    return {
        "inbox": [
            Column("id", Uuid, primary_key=True),
            Column("accepted_at", _TIME, nullable=False, server_default=_NOW),
            _index(f"{table}_accepted_at", "accepted_at"),
        ],
        "version": _version(),
    }


def _message(*, defaults: bool = True) -> list[SchemaItem]:
    return [
        Column("id", Uuid, nullable=False),
        Column("recorded_at", _TIME, nullable=False, server_default=_NOW if defaults else None),
        Column("topic", Text, nullable=False),
        Column("key", Text),
        Column("headers", Text, nullable=False, server_default=text("'{}'::text") if defaults else None),
        Column("payload", LargeBinary, nullable=False),
    ]


def _version() -> list[SchemaItem]:
    return [
        Column("version", Integer, primary_key=True, autoincrement=False),
        Column("applied_at", _TIME, nullable=False, server_default=_NOW),
    ]


def _index(name: str, *columns: str, where: str | None = None) -> Index:
    return Index(conv(name), *columns, postgresql_where=None if where is None else text(where))


def _check(table: str, column: str, condition: str) -> CheckConstraint:
    """Makes a constraint of the name that PostgreSQL gives it, which is cut in the table's part."""
    end = f"_{column}_check"
    begin = table.encode()[: _LONGEST_IDENTIFIER - len(end)].decode(errors="ignore")
    return CheckConstraint(text(condition), name=conv(begin + end))


def _add(tables: Tables, metadata: MetaData, contents: dict[str, list[SchemaItem]]) -> dict[str, Table]:
    first, *_ = contents
    added = {
        role: Table(tables.table if role == first else f"{tables.table}_{role}", metadata, *items, schema=tables.schema)
        for role, items in contents.items()
    }
    metadata.info.setdefault(KEPT_AS, []).append((tables, list(added.values())))
    _create_by_migration(tables, metadata, list(added.values()))
    return added


def _create_by_migration(migrated: Tables, metadata: MetaData, ours: list[Table]) -> None:
    """Lets `create_all` make what a migration makes, storage parameters, first rows and version included."""

    def before(_: object, connection: Connection, *, tables: list[Table], **__: object) -> None:
        missing = [table for table in ours if table in tables]
        if missing and len(missing) < len(ours):
            raise SchemaError(migrated._remedy(f"lacks the table {missing[0].name!r}"))
        if missing:
            schema = migrated._version
            statement = one_statement(f"IF NOT ({schema.schema_exists}) THEN {schema.create_schema}; END IF;\n")
            connection.execute(as_ddl(statement))

    def after(_: object, connection: Connection, *, tables: list[Table], **__: object) -> None:
        if ours[0] in tables:  # all of them were made just now, and are empty
            for table in reversed(ours):
                connection.execute(DropTable(table))
            connection.execute(as_ddl(migrated._upgrade_sql()))

    event.listen(metadata, "before_create", before)
    event.listen(metadata, "after_create", after)


def as_ddl(statement: str) -> DDL:
    """Makes a statement for any driver and for printing; DDL takes a percent sign for its own."""
    return DDL(statement.replace("%", "%%"))  # type: ignore[no-untyped-call]  # SQLAlchemy's, which has no types
