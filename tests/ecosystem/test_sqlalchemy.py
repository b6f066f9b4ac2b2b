"""`SQLAlchemyDispatcher` in every kind of transaction SQLAlchemy has, and the tables in its `MetaData`."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import MetaData, NullPool, Table, event, func, make_url, select, text
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import (
    CodecError,
    Dispatcher,
    Inbox,
    Message,
    NotInTransactionError,
    Outbox,
    OutboxDispatcher,
    OutboxError,
    Relay,
    SchemaError,
)
from outbox.sqlalchemy import SQLAlchemyDispatcher, inbox_tables, outbox_tables
from outbox.testing import CollectingDispatcher
from tests.test_schema import catalog

Connection = Any  # of the driver, or of its pool
LATER = datetime(2999, 1, 1, tzinfo=UTC)
MANY = 12_001


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


def a_message(payload: Any = 1, **fields: Any) -> Message:
    return Message(payload, **({"topic": "orders"} | fields))


async def payloads(connection: Connection, outbox: Outbox) -> list[Any]:
    return [message.payload for message in await outbox.retrieve(connection, 100_000)]


def url(dsn: str, driver: str = "asyncpg") -> str:
    return make_url(dsn).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)


@asynccontextmanager
async def engine_on(dsn: str, driver: str = "asyncpg", **settings: Any) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url(dsn, driver), **settings)
    try:
        yield engine
    finally:
        async with asyncio.timeout(5):
            await engine.dispose()


@pytest.fixture
async def engine(dsn: str, outbox: Outbox) -> AsyncIterator[AsyncEngine]:
    """An engine whose tables of no schema are in that of the outbox."""
    async with engine_on(dsn, connect_args={"server_settings": {"search_path": outbox.schema}}) as engine:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield engine


# --- transactions ---------------------------------------------------------------------------------------

Begin = Callable[[AsyncEngine], AbstractAsyncContextManager[Any]]


@asynccontextmanager
async def session_begin(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine) as session, session.begin():
        yield session


@asynccontextmanager
async def maker_begin(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with async_sessionmaker(engine).begin() as session:
        yield session


@asynccontextmanager
async def begun_by_a_statement(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine) as session:
        await session.execute(text("SELECT 1"))
        yield session
        await session.commit()


@asynccontextmanager
async def begun_by_an_object(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine) as session:
        session.add(Order(id=1))
        yield session
        await session.commit()


@asynccontextmanager
async def without_autobegin(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine, autobegin=False) as session, session.begin():
        yield session


@asynccontextmanager
async def scoped(engine: AsyncEngine) -> AsyncIterator[async_scoped_session[AsyncSession]]:
    session = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
    try:
        async with session.begin():
            yield session
    finally:
        await session.remove()


@asynccontextmanager
async def bound_to_a_connection(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with engine.begin() as connection, AsyncSession(connection) as session, session.begin():
        yield session


@asynccontextmanager
async def engine_begin(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with engine.begin() as connection:
        yield connection


@asynccontextmanager
async def connection_begin(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with engine.connect() as connection, connection.begin():
        yield connection


EVERY_TRANSACTION = pytest.mark.parametrize(
    "begin",
    [
        session_begin,
        maker_begin,
        begun_by_a_statement,
        begun_by_an_object,
        without_autobegin,
        scoped,
        bound_to_a_connection,
        engine_begin,
        connection_begin,
    ],
)


@EVERY_TRANSACTION
async def test_a_message_is_there_when_the_transaction_has_committed_and_not_before(
    begin: Begin, engine: AsyncEngine, connection: Connection, outbox: Outbox
) -> None:
    async with begin(engine) as session:
        dispatcher: Dispatcher = SQLAlchemyDispatcher(session, outbox)
        await dispatcher.dispatch(a_message(1, key="k", headers={"a": "b"}))
        await dispatcher.dispatch(a_message(2), a_message(3))
        assert await payloads(connection, outbox) == []
    messages = await outbox.retrieve(connection, 10)
    assert [message.payload for message in messages] == [1, 2, 3]
    assert (messages[0].topic, messages[0].key, dict(messages[0].headers)) == ("orders", "k", {"a": "b"})


@EVERY_TRANSACTION
async def test_a_message_goes_when_the_transaction_is_rolled_back(
    begin: Begin, engine: AsyncEngine, connection: Connection, outbox: Outbox
) -> None:
    with suppress(ZeroDivisionError):
        async with begin(engine) as session:
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message())
            raise ZeroDivisionError
    assert await payloads(connection, outbox) == []


async def test_a_savepoint_takes_its_own_messages_along(
    engine: AsyncEngine, connection: Connection, outbox: Outbox
) -> None:
    async with AsyncSession(engine) as session, session.begin():
        dispatcher = SQLAlchemyDispatcher(session, outbox)
        async with session.begin_nested():
            await dispatcher.dispatch(a_message("kept"))
        with suppress(ZeroDivisionError):
            async with session.begin_nested():
                await dispatcher.dispatch(a_message("gone"))
                raise ZeroDivisionError
        await dispatcher.dispatch(a_message("after"))
    assert await payloads(connection, outbox) == ["kept", "after"]


async def test_what_is_pending_in_the_session_is_not_flushed_and_commits_together(
    engine: AsyncEngine, connection: Connection, outbox: Outbox
) -> None:
    async with AsyncSession(engine) as session, session.begin():
        order = Order(id=1)
        session.add(order)
        await SQLAlchemyDispatcher(session, outbox).dispatch(a_message())
        assert order in session.new
    async with AsyncSession(engine) as session:
        assert await session.get(Order, 1)
    assert await payloads(connection, outbox) == [1]


async def test_a_flush_that_fails_at_the_commit_takes_the_message_along(
    engine: AsyncEngine, connection: Connection, outbox: Outbox
) -> None:
    async with AsyncSession(engine) as session, session.begin():
        session.add(Order(id=1))
    async with AsyncSession(engine) as session:
        session.add(Order(id=1))
        await SQLAlchemyDispatcher(session, outbox).dispatch(a_message())
        with pytest.raises(IntegrityError):
            await session.commit()
    assert await payloads(connection, outbox) == []


async def test_many_messages_and_delayed_ones_in_one_call(
    engine: AsyncEngine, connection: Connection, outbox: Outbox
) -> None:
    async with AsyncSession(engine) as session, session.begin():
        dispatcher = SQLAlchemyDispatcher(session, outbox, decorators=[lambda message: message.with_header("a", "b")])
        await dispatcher.dispatch(*map(a_message, range(MANY)), a_message("later", due_at=LATER))
        await dispatcher.dispatch()
    assert await payloads(connection, outbox) == [*range(MANY), "later"]
    assert (await outbox.counts(connection)).waiting == 1
    [first] = await outbox.retrieve(connection, 1)
    assert dict(first.headers) == {"a": "b"}


@pytest.mark.parametrize(
    "options", [{"stream_results": True}, {"yield_per": 10}, {"stream_results": True, "yield_per": 1}]
)
async def test_a_connection_that_streams_its_results_writes_all_the_same(
    options: dict[str, Any], engine: AsyncEngine, connection: Connection, outbox: Outbox
) -> None:
    async with engine.connect() as plain:
        streaming = await plain.execution_options(**options)
        async with streaming.begin():
            await SQLAlchemyDispatcher(streaming, outbox).dispatch(a_message(1))
            await SQLAlchemyDispatcher(streaming, outbox).dispatch(a_message(2), a_message(3))
    assert await payloads(connection, outbox) == [1, 2, 3]


async def test_one_dispatch_is_one_statement_which_sqlalchemy_sees(engine: AsyncEngine, outbox: Outbox) -> None:
    statements: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement.split(maxsplit=1)[0])

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    async with AsyncSession(engine) as session, session.begin():
        await SQLAlchemyDispatcher(session, outbox).dispatch(a_message())
        await SQLAlchemyDispatcher(session, outbox).dispatch(a_message(), a_message())
    assert statements == ["INSERT", "INSERT"]


async def test_it_works_through_pgbouncer_with_what_sqlalchemy_says_of_it(
    pgbouncer_dsn: str, connection: Connection, outbox: Outbox
) -> None:
    names = {"prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__", "prepared_statement_cache_size": 0}
    async with engine_on(pgbouncer_dsn, poolclass=NullPool, connect_args=names) as engine:
        for number in range(5):
            async with AsyncSession(engine) as session, session.begin():
                await SQLAlchemyDispatcher(session, outbox).dispatch(a_message(number))
    assert await payloads(connection, outbox) == list(range(5))


# --- no transaction -------------------------------------------------------------------------------------


async def fresh(session: AsyncSession) -> None:
    pass


async def committed(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))
    await session.commit()


async def rolled_back(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))
    await session.rollback()


async def closed(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))
    await session.close()


@pytest.mark.parametrize("make", [fresh, committed, rolled_back, closed])
async def test_a_session_without_a_transaction_is_refused(
    make: Callable[[AsyncSession], Any], engine: AsyncEngine, connection: Connection, outbox: Outbox
) -> None:
    message = a_message()
    async with AsyncSession(engine) as session:
        await make(session)
        with pytest.raises(NotInTransactionError, match=f"{message.id} was not written: no transaction has begun"):
            await SQLAlchemyDispatcher(session, outbox).dispatch(message)
        await session.commit()
    assert await payloads(connection, outbox) == []


async def test_a_connection_without_a_transaction_is_refused(engine: AsyncEngine, outbox: Outbox) -> None:
    async with engine.connect() as unbegun:
        with pytest.raises(NotInTransactionError, match="begun on this AsyncConnection"):
            await SQLAlchemyDispatcher(unbegun, outbox).dispatch(a_message())
    with pytest.raises(NotInTransactionError, match="begun on this AsyncConnection"):
        await SQLAlchemyDispatcher(unbegun, outbox).dispatch(a_message())
    with pytest.raises(OutboxError, match="AsyncContextNotStarted"):
        await SQLAlchemyDispatcher(engine.connect(), outbox).dispatch(a_message())


async def test_autocommit_of_the_engine_is_refused(dsn: str, connection: Connection, outbox: Outbox) -> None:
    async with (
        engine_on(dsn, isolation_level="AUTOCOMMIT") as engine,
        AsyncSession(engine) as session,
        session.begin(),
    ):
        with pytest.raises(NotInTransactionError, match="AUTOCOMMIT each statement commits by itself"):
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message())
    assert await payloads(connection, outbox) == []


async def test_autocommit_of_one_transaction_is_refused(
    engine: AsyncEngine, connection: Connection, outbox: Outbox
) -> None:
    async with AsyncSession(engine) as session:
        bound = await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        await bound.execute(text("SELECT 1"))
        with pytest.raises(NotInTransactionError, match="AUTOCOMMIT each statement commits by itself"):
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message())
    assert await payloads(connection, outbox) == []


async def test_a_stricter_isolation_is_fine(engine: AsyncEngine, connection: Connection, outbox: Outbox) -> None:
    async with AsyncSession(engine) as session, session.begin():
        bound = await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        assert bound.in_transaction()
        await SQLAlchemyDispatcher(session, outbox).dispatch(a_message())
    assert await payloads(connection, outbox) == [1]


async def test_a_session_whose_flush_has_failed_is_refused_until_it_is_rolled_back(
    engine: AsyncEngine, connection: Connection, outbox: Outbox
) -> None:
    async with AsyncSession(engine) as session:
        session.add_all([Order(id=1), Order(id=1)])
        with pytest.raises(IntegrityError):
            await session.flush()
        with pytest.raises(NotInTransactionError, match="the transaction of this session is over") as caught:
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message())
        assert isinstance(caught.value.__cause__, PendingRollbackError)
        await session.rollback()
        async with session.begin():
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message(2))
    assert await payloads(connection, outbox) == [2]


# --- errors ---------------------------------------------------------------------------------------------


async def test_what_cannot_be_encoded_leaves_the_transaction_unharmed(
    engine: AsyncEngine, connection: Connection, outbox: Outbox
) -> None:
    async with AsyncSession(engine) as session, session.begin():
        with pytest.raises(CodecError):
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message(), a_message(object()))
        await SQLAlchemyDispatcher(session, outbox).dispatch(a_message(2))
    assert await payloads(connection, outbox) == [2]


async def test_an_error_of_the_database_leaves_the_session_to_be_rolled_back(
    engine: AsyncEngine, connection: Connection, outbox: Outbox
) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(text("SELECT 1"))
        with pytest.raises(SchemaError, match=r"run outbox\.migrate") as caught:
            await SQLAlchemyDispatcher(session, Outbox("missing")).dispatch(a_message())
        assert isinstance(caught.value.__cause__, asyncpg.UndefinedTableError)
        with pytest.raises(OutboxError, match="InFailedSQLTransactionError"):
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message())
        await session.rollback()
        async with session.begin():
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message(2))
    assert await payloads(connection, outbox) == [2]


def chain_of(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    return chain


async def test_the_chain_of_causes_has_an_end(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        with pytest.raises(SchemaError) as caught:
            await SQLAlchemyDispatcher(session, Outbox("missing")).dispatch(a_message())
        await session.rollback()
    assert chain_of(caught.value)[-1].__cause__ is None


async def test_a_savepoint_saves_the_transaction_from_an_error_of_the_database(
    engine: AsyncEngine, connection: Connection, outbox: Outbox
) -> None:
    async with AsyncSession(engine) as session, session.begin():
        with pytest.raises(SchemaError):
            async with session.begin_nested():
                await SQLAlchemyDispatcher(session, Outbox("missing")).dispatch(a_message())
        await SQLAlchemyDispatcher(session, outbox).dispatch(a_message(2))
    assert await payloads(connection, outbox) == [2]


@pytest.mark.parametrize("statements", [0, 1])
async def test_after_a_lost_connection_a_rollback_makes_the_session_usable_again(
    statements: int, engine: AsyncEngine, connection: Connection, outbox: Outbox
) -> None:
    async with AsyncSession(engine) as session:
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        for _ in range(statements):
            await session.execute(text("SELECT 1"))
        await connection.fetchval("SELECT pg_terminate_backend($1, 5000)", driver.get_server_pid())
        with pytest.raises(OutboxError):
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message(1))
        with pytest.raises(NotInTransactionError, match="is over"):
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message(2))
        await session.rollback()
        async with session.begin():
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message(3))
    assert await payloads(connection, outbox) == [3]


async def test_a_database_that_cannot_be_reached_is_our_error(unused_tcp_port: int, outbox: Outbox) -> None:
    async with (
        engine_on(f"postgresql://postgres@127.0.0.1:{unused_tcp_port}/postgres") as engine,
        AsyncSession(engine) as session,
        session.begin(),
    ):
        with pytest.raises(OutboxError, match=r"was not written: .*Connect") as caught:
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message())
        assert isinstance(caught.value.__cause__, OSError)


async def test_another_driver_is_refused(dsn: str, outbox: Outbox) -> None:
    async with engine_on(dsn, "psycopg") as engine, AsyncSession(engine) as session, session.begin():
        with pytest.raises(OutboxError, match=r"on postgresql\+psycopg\. It must be on postgresql\+asyncpg"):
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message())


async def test_a_session_that_does_not_know_its_engine_is_refused_and_its_connection_is_not(
    engine: AsyncEngine, connection: Connection, outbox: Outbox
) -> None:
    async with AsyncSession(binds={Order: engine}) as session, session.begin():
        with pytest.raises(OutboxError, match="UnboundExecutionError"):
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message())
        bound = await session.connection(bind_arguments={"mapper": Order})
        await SQLAlchemyDispatcher(bound, outbox).dispatch(a_message())
    assert await payloads(connection, outbox) == [1]


async def test_what_is_no_session_is_refused_at_the_door(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        for wrong in (engine, session.sync_session, None):
            with pytest.raises(TypeError, match=f"AsyncConnection, not {type(wrong).__name__}"):
                SQLAlchemyDispatcher(wrong)  # type: ignore[arg-type]


# --- the relay's wake-up ---------------------------------------------------------------------------------


class Bell:
    """Counts how often it was rung."""

    def __init__(self) -> None:
        self.rings = 0
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self.rings += 1
        self._rung.set()

    async def wait_for(self, rings: int) -> None:
        async with asyncio.timeout(5):
            while self.rings < rings:
                self._rung.clear()
                await self._rung.wait()


@EVERY_TRANSACTION
async def test_a_commit_wakes_who_listens_once_and_not_before(
    begin: Begin, engine: AsyncEngine, outbox: Outbox
) -> None:
    bell = Bell()
    with outbox._wakeup.listening(bell.ring), outbox._wakeup.asleep():  # noqa: SLF001 -- what a relay does
        async with begin(engine) as session:
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message())
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message(), a_message())
            for _ in range(3):
                await session.execute(text("SELECT 1"))
            assert bell.rings == 0
        await bell.wait_for(1)
    assert bell.rings == 1


async def test_a_commit_rings_also_when_its_transaction_followed_another_at_once(
    engine: AsyncEngine, outbox: Outbox
) -> None:
    """The driver tells of a statement in the next turn of the loop, and there is none between these transactions."""
    bell = Bell()
    with outbox._wakeup.listening(bell.ring), outbox._wakeup.asleep():  # noqa: SLF001 -- as above
        async with engine.connect() as connection:
            for _ in range(20):
                async with connection.begin():
                    await SQLAlchemyDispatcher(connection, outbox).dispatch(a_message())
        await bell.wait_for(20)


async def test_an_idle_relay_takes_what_was_committed(engine: AsyncEngine, pool: Any, outbox: Outbox) -> None:
    destination = CollectingDispatcher()
    relay = Relay(outbox, pool, destination, poll_interval=timedelta(hours=1))
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(relay.run())
        async with async_sessionmaker(engine).begin() as session:
            await SQLAlchemyDispatcher(session, outbox).dispatch(a_message("woken"))
        await destination.wait_for(1)
        await relay.stop()
        await running
    assert [message.payload for message in destination.messages] == ["woken"]


# --- the tables -----------------------------------------------------------------------------------------

NAMES = [
    ("outbox", "public"),
    ("mail", "messaging"),
    ('Odd "name"; -- 100% :of $outbox$', "Other {schema}.x"),
    ("ö" * 24, "ü" * 31),
]


CONVENTION = {"pk": "key_%(table_name)s", "ck": "check_%(constraint_name)s", "ix": "index_%(column_0_label)s"}


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize(("table", "schema"), NAMES)
async def test_create_all_makes_what_migrate_makes(driver: str, table: str, schema: str, database: str) -> None:
    outbox, inbox = Outbox(table, schema=schema), Inbox(table[:20] + "_in", schema=schema)
    metadata = MetaData(schema="elsewhere" if schema == "public" else None, naming_convention=CONVENTION)
    tables = outbox_tables(outbox, metadata) | inbox_tables(inbox, metadata)
    Table("orders", metadata, Order.__table__.c.id._copy(), schema="public")  # noqa: SLF001 -- a table of the user's
    connection = await asyncpg.connect(database)
    transaction = connection.transaction()
    await transaction.start()
    await outbox.migrate(connection)
    await inbox.migrate(connection)
    await connection.execute("CREATE TABLE public.orders (id integer NOT NULL, CONSTRAINT key_orders PRIMARY KEY (id))")
    expected = await catalog(connection, schema)
    await transaction.rollback()

    async with engine_on(database, driver) as engine:
        for _ in range(2):  # the second time there is nothing to do
            async with engine.begin() as made:
                await made.run_sync(metadata.create_all)
        assert await catalog(connection, schema) == expected
        await outbox.check(connection)
        await inbox.check(connection)
        async with connection.transaction():
            await OutboxDispatcher(connection, outbox).dispatch(a_message())
        async with engine.connect() as reader:
            assert await reader.scalar(select(func.count()).select_from(tables["outbox"])) == 1
            assert await reader.scalar(select(func.count()).select_from(tables["slots"])) == 64
        async with engine.begin() as dropped:
            await dropped.run_sync(metadata.drop_all)
    assert (await catalog(connection, schema))["relations"] == []
    await connection.close(timeout=5)


async def test_create_all_refuses_tables_that_are_there_in_part(database: str) -> None:
    outbox, metadata = Outbox(), MetaData()
    outbox_tables(outbox, metadata)
    connection = await asyncpg.connect(database)
    await outbox.migrate(connection)
    await OutboxDispatcher(connection, outbox)._outbox.persist(connection, a_message())  # noqa: SLF001 -- no transaction
    await connection.execute("DROP TABLE outbox_slots")
    before = await catalog(connection, "public")
    async with engine_on(database) as engine, engine.connect() as partly:
        with pytest.raises(SchemaError, match=r"lacks the table 'outbox_slots': run outbox\.migrate"):
            await partly.run_sync(metadata.create_all)
    assert await catalog(connection, "public") == before
    assert await payloads(connection, outbox) == [1]
    await connection.close(timeout=5)


async def test_create_all_of_other_tables_alone_makes_none_of_ours(database: str) -> None:
    metadata = MetaData()
    outbox_tables(Outbox(), metadata)
    alone = Table("alone", metadata)
    async with engine_on(database) as engine, engine.begin() as connection:
        await connection.run_sync(metadata.create_all, tables=[alone])
        assert (
            await connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"))
        ).all() == ["alone"]
