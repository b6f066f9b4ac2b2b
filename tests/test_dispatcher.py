"""`OutboxDispatcher` on every kind of connection, and the dispatchers that stand between two others."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from outbox import (
    ChainDispatcher,
    CodecError,
    DestinationUnavailableError,
    Dispatcher,
    FilteringDispatcher,
    HandlerDispatcher,
    Message,
    NotInTransactionError,
    Outbox,
    OutboxDispatcher,
    OutboxError,
    PartialDispatchError,
    RejectedError,
    RoutingDispatcher,
    SchemaError,
    TranslatingDispatcher,
)

Connection = Any  # of the driver, or of its pool
LATER = datetime(2999, 1, 1, tzinfo=UTC)
MANY = 12_001


def a_message(payload: Any = 1, **fields: Any) -> Message:
    return Message(payload, **({"topic": "orders"} | fields))


async def payloads(connection: Connection, outbox: Outbox) -> list[Any]:
    return [message.payload for message in await outbox.retrieve(connection, 100_000)]


class Collecting:
    """A destination that remembers each call, and may fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[Message, ...]] = []
        self._error = error

    async def dispatch(self, *messages: Message) -> None:
        self.calls.append(messages)
        if self._error:
            raise self._error

    @property
    def messages(self) -> list[Message]:
        return [message for call in self.calls for message in call]


# --- inside a transaction, or not at all ----------------------------------------------------------------


async def test_what_was_dispatched_is_there_after_the_commit(connection: Connection, outbox: Outbox) -> None:
    message = a_message({"order": 1}, key="k", headers={"a": "b"})
    async with connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(message)
    assert await outbox.retrieve(connection, 10) == [message]


async def test_what_was_dispatched_is_gone_after_a_rollback(connection: Connection, outbox: Outbox) -> None:
    transaction = connection.transaction()
    await transaction.start()
    await OutboxDispatcher(connection, outbox).dispatch(a_message(), a_message(due_at=LATER))
    assert len(await payloads(connection, outbox)) == 2
    await transaction.rollback()
    assert await payloads(connection, outbox) == []


async def test_a_savepoint_rolled_back_takes_its_messages_along_and_no_others(
    connection: Connection, outbox: Outbox
) -> None:
    dispatcher = OutboxDispatcher(connection, outbox)
    async with connection.transaction():
        await dispatcher.dispatch(a_message("before"))
        savepoint = connection.transaction()
        await savepoint.start()
        await dispatcher.dispatch(a_message("inside"), a_message("delayed", due_at=LATER))
        await savepoint.rollback()
        await dispatcher.dispatch(a_message("after"))
    assert await payloads(connection, outbox) == ["before", "after"]


async def test_a_transaction_that_was_begun_by_a_statement_is_a_transaction(
    connection: Connection, outbox: Outbox
) -> None:
    await connection.execute("BEGIN")
    await OutboxDispatcher(connection, outbox).dispatch(a_message())
    await connection.execute("COMMIT")
    assert await payloads(connection, outbox) == [1]


async def test_a_connection_of_a_pool_will_do(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    async with pool.acquire() as pooled, pooled.transaction():
        await OutboxDispatcher(pooled, outbox).dispatch(a_message())
    async with pool.acquire() as pooled:
        assert await payloads(pooled, outbox) == [1]


async def test_without_a_transaction_nothing_is_written_and_the_error_says_what_to_do(
    connection: Connection, outbox: Outbox
) -> None:
    message = a_message()
    with pytest.raises(NotInTransactionError) as caught:
        await OutboxDispatcher(connection, outbox).dispatch(message)
    assert str(message.id) in str(caught.value)
    assert "async with connection.transaction():" in str(caught.value)
    assert await payloads(connection, outbox) == []


async def test_a_pool_is_no_connection_and_the_error_says_what_to_do(pool: Any, outbox: Outbox) -> None:
    message = a_message()
    with pytest.raises(TypeError, match=rf"{message.id} was not written: Pool is no connection .*pool\.acquire"):
        await OutboxDispatcher(pool, outbox).dispatch(message)


async def test_after_the_transaction_has_ended_the_dispatcher_refuses(connection: Connection, outbox: Outbox) -> None:
    dispatcher = OutboxDispatcher(connection, outbox)
    async with connection.transaction():
        await dispatcher.dispatch(a_message())
    with pytest.raises(NotInTransactionError):
        await dispatcher.dispatch(a_message())


async def test_dispatching_nothing_is_no_error_and_needs_no_transaction(connection: Connection, outbox: Outbox) -> None:
    await OutboxDispatcher(connection, outbox).dispatch()
    assert await payloads(connection, outbox) == []


# --- a connection that is of no use ---------------------------------------------------------------------


async def test_on_a_closed_connection_the_error_is_ours_and_names_the_message(dsn: str, outbox: Outbox) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.close()
    message = a_message()
    with pytest.raises(OutboxError, match=f"message {message.id} was not written: .*closed") as caught:
        await OutboxDispatcher(connection, outbox).dispatch(message)
    assert type(caught.value) is OutboxError


async def test_on_a_connection_back_in_its_pool_the_error_is_ours_and_names_the_message(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    async with pool.acquire() as pooled:
        dispatcher = OutboxDispatcher(pooled, outbox)
    message = a_message()
    with pytest.raises(OutboxError, match=f"message {message.id} was not written: .*released") as caught:
        await dispatcher.dispatch(message)
    assert isinstance(caught.value.__cause__, asyncpg.InterfaceError)


@pytest.mark.parametrize("count", [1, 3])
async def test_on_a_connection_that_the_server_has_cut_the_error_is_ours_with_the_drivers_as_its_cause(
    count: int, dsn: str, connection: Connection, outbox: Outbox
) -> None:
    broken = await asyncpg.connect(dsn)
    await broken.execute("BEGIN")
    pid = broken.get_server_pid()
    assert await connection.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)
    messages = [a_message() for _ in range(count)]
    with pytest.raises(OutboxError, match=str(messages[0].id)) as caught:
        await OutboxDispatcher(broken, outbox).dispatch(*messages)
    assert type(caught.value) is OutboxError
    assert caught.value.__cause__ is not None or broken.is_closed()
    assert await payloads(connection, outbox) == []


async def test_a_transaction_that_the_server_has_aborted_takes_no_more_messages(
    connection: Connection, outbox: Outbox
) -> None:
    await connection.execute("BEGIN")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.execute("SELECT 1/0")
    message = a_message()
    with pytest.raises(OutboxError, match=f"{message.id}.*transaction is aborted") as caught:
        await OutboxDispatcher(connection, outbox).dispatch(message)
    assert isinstance(caught.value.__cause__, asyncpg.InFailedSQLTransactionError)
    await connection.execute("ROLLBACK")


async def test_a_transaction_that_may_only_read_takes_no_messages(connection: Connection, outbox: Outbox) -> None:
    with pytest.raises(OutboxError, match="read-only") as caught:
        async with connection.transaction(readonly=True):
            await OutboxDispatcher(connection, outbox).dispatch(a_message())
    assert isinstance(caught.value.__cause__, asyncpg.ReadOnlySQLTransactionError)


@pytest.mark.parametrize("isolation", ["read_committed", "repeatable_read", "serializable"])
async def test_every_isolation_level_will_do(isolation: Any, connection: Connection, outbox: Outbox) -> None:
    async with connection.transaction(isolation=isolation):
        await OutboxDispatcher(connection, outbox).dispatch(a_message(1), a_message(2))
    assert await payloads(connection, outbox) == [1, 2]


@pytest.mark.parametrize("due_at", [None, LATER], ids=["fresh", "delayed"])
@pytest.mark.parametrize("missing", ["table", "schema"])
async def test_without_the_table_the_error_says_how_to_make_it(
    missing: str, due_at: datetime | None, connection: Connection, outbox: Outbox
) -> None:
    wrong = Outbox("nothing", schema=outbox.schema if missing == "table" else "no such schema")
    with pytest.raises(SchemaError) as caught:
        async with connection.transaction():
            await OutboxDispatcher(connection, wrong).dispatch(a_message(due_at=due_at))
    assert repr(wrong) in str(caught.value)
    assert "run outbox.migrate(connection), or apply outbox.schema_sql()" in str(caught.value)
    assert isinstance(caught.value.__cause__, asyncpg.PostgresError)


async def test_a_dispatch_that_is_cancelled_lets_the_cancellation_through(
    connection: Connection, dsn: str, outbox: Outbox
) -> None:
    blocker = await asyncpg.connect(dsn)
    await blocker.execute(f'BEGIN; LOCK TABLE "{outbox.schema}"."outbox"')
    with pytest.raises(TimeoutError) as caught:
        async with connection.transaction(), asyncio.timeout(0.05):
            await OutboxDispatcher(connection, outbox).dispatch(a_message())
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    await blocker.close()
    assert await payloads(connection, outbox) == []


async def test_a_command_that_times_out_is_our_error(dsn: str, connection: Connection, outbox: Outbox) -> None:
    hasty = await asyncpg.connect(dsn, command_timeout=0.05)
    await connection.execute(f'BEGIN; LOCK TABLE "{outbox.schema}"."outbox"')
    message = a_message()
    with pytest.raises(OutboxError, match=str(message.id)) as caught:
        async with hasty.transaction():
            await OutboxDispatcher(hasty, outbox).dispatch(message)
    assert isinstance(caught.value.__cause__, TimeoutError)
    await connection.execute("ROLLBACK")
    await hasty.close()


# --- payloads that cannot be written --------------------------------------------------------------------


async def test_a_payload_that_cannot_be_encoded_leaves_the_transaction_unharmed_and_writes_nothing(
    connection: Connection, outbox: Outbox
) -> None:
    dispatcher = OutboxDispatcher(connection, outbox)
    bad = a_message({"a": [b"x"]})
    async with connection.transaction():
        with pytest.raises(CodecError) as caught:
            await dispatcher.dispatch(a_message(), bad, a_message(due_at=LATER))
        assert str(caught.value).startswith(f"message {bad.id}: $['a'][0] (bytes)")
        assert await payloads(connection, outbox) == []
        await dispatcher.dispatch(a_message("still possible"))
    assert await payloads(connection, outbox) == ["still possible"]


@pytest.mark.parametrize("wrong", [[a_message()], None, {"order": 1}], ids=["list", "None", "dict"])
async def test_what_is_no_message_is_a_type_error_that_says_so(
    wrong: Any, connection: Connection, outbox: Outbox
) -> None:
    async with connection.transaction():
        with pytest.raises(TypeError, match=f"Message.*{type(wrong).__name__}"):
            await OutboxDispatcher(connection, outbox).dispatch(wrong)
        with pytest.raises(TypeError, match=f"Message.*{type(wrong).__name__}"):
            await outbox.persist(connection, a_message(), wrong)
    assert await payloads(connection, outbox) == []


# --- many -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("due_at", [None, LATER], ids=["fresh", "delayed"])
async def test_thousands_in_one_call_keep_their_order(
    due_at: datetime | None, connection: Connection, outbox: Outbox
) -> None:
    messages = [a_message(number, due_at=due_at) for number in range(MANY)]
    async with connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(*messages)
    found = await outbox.retrieve(connection, MANY + 1)
    assert [message.payload for message in found] == list(range(MANY))
    assert [message.id for message in found] == [message.id for message in messages]


async def test_fresh_and_delayed_ones_in_one_call_each_keep_their_order(connection: Connection, outbox: Outbox) -> None:
    messages = [a_message(number, due_at=LATER if number % 3 == 0 else None) for number in range(100)]
    async with connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(*messages)
    found = await payloads(connection, outbox)
    assert sorted(found) == list(range(100))
    assert [number for number in found if number % 3] == [number for number in range(100) if number % 3]
    assert [number for number in found if not number % 3] == list(range(0, 100, 3))
    counts = await outbox.counts(connection)
    assert (counts.pending, counts.waiting) == (100, 34)


async def test_one_fresh_between_delayed_ones_is_written_too(connection: Connection, outbox: Outbox) -> None:
    async with connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(a_message(1, due_at=LATER), a_message(2))
    assert sorted(await payloads(connection, outbox)) == [1, 2]


async def test_calls_keep_their_order_whatever_their_sizes(connection: Connection, outbox: Outbox) -> None:
    dispatcher = OutboxDispatcher(connection, outbox)
    async with connection.transaction():
        for start, count in ((0, 1), (1, 3), (4, 1), (5, 100)):
            await dispatcher.dispatch(*(a_message(number) for number in range(start, start + count)))
    assert await payloads(connection, outbox) == list(range(105))


async def test_when_one_of_thousands_cannot_be_written_none_is(connection: Connection, outbox: Outbox) -> None:
    await connection.execute(f'ALTER TABLE "{outbox.schema}"."outbox" ADD CONSTRAINT no_bad CHECK (topic <> \'bad\')')
    messages = [a_message(number, topic="bad" if number == MANY - 1 else "good") for number in range(MANY)]
    with pytest.raises(OutboxError, match="no_bad") as caught:
        async with connection.transaction():
            await OutboxDispatcher(connection, outbox).dispatch(*messages)
    assert isinstance(caught.value.__cause__, asyncpg.CheckViolationError)
    assert await payloads(connection, outbox) == []


# --- decorators -----------------------------------------------------------------------------------------


def saying(word: str) -> Callable[[Message], Message]:
    return lambda message: message.with_header("said", message.headers.get("said", "") + word)


async def test_decorators_are_applied_in_their_order_to_each_message(connection: Connection, outbox: Outbox) -> None:
    dispatcher = OutboxDispatcher(connection, outbox, decorators=[saying("a"), saying("b"), saying("c")])
    messages = [a_message(), a_message(headers={"said": "0"})]
    async with connection.transaction():
        await dispatcher.dispatch(*messages)
    found = await outbox.retrieve(connection, 10)
    assert [message.headers["said"] for message in found] == ["abc", "0abc"]
    assert messages[0].headers == {}  # the caller's own are as they were


async def test_decorators_given_as_an_iterator_last_for_every_dispatch(connection: Connection, outbox: Outbox) -> None:
    dispatcher = OutboxDispatcher(connection, outbox, decorators=iter([saying("a")]))
    async with connection.transaction():
        await dispatcher.dispatch(a_message())
        await dispatcher.dispatch(a_message())
    assert [message.headers for message in await outbox.retrieve(connection, 10)] == [{"said": "a"}] * 2


async def test_a_decorator_that_fails_leaves_the_transaction_unharmed(connection: Connection, outbox: Outbox) -> None:
    dispatcher = OutboxDispatcher(connection, outbox, decorators=[lambda message: message.with_header("a", "\0")])
    async with connection.transaction():
        with pytest.raises(ValueError, match="contains NUL"):
            await dispatcher.dispatch(a_message())
    assert await payloads(connection, outbox) == []


async def test_a_decorator_that_forgets_to_return_is_a_type_error_that_says_so(
    connection: Connection, outbox: Outbox
) -> None:
    forgetful: Any = lambda _: None  # noqa: E731 -- the whole of it
    async with connection.transaction():
        with pytest.raises(TypeError, match=r"Message.*NoneType"):
            await OutboxDispatcher(connection, outbox, decorators=[forgetful]).dispatch(a_message())


# --- the dispatchers in between -------------------------------------------------------------------------


def test_every_dispatcher_is_a_dispatcher(connection: Connection, outbox: Outbox) -> None:
    inner = Collecting()
    every: list[object] = [
        inner,
        OutboxDispatcher(connection, outbox),
        ChainDispatcher(inner),
        FilteringDispatcher(bool, inner),
        TranslatingDispatcher(copy.copy, inner),
        HandlerDispatcher(inner.dispatch),
    ]
    assert all(isinstance(dispatcher, Dispatcher) for dispatcher in every)
    assert not isinstance(outbox, Dispatcher)


@pytest.mark.parametrize(
    "make",
    [ChainDispatcher, lambda inner: FilteringDispatcher(bool, inner), lambda inner: HandlerDispatcher(inner.dispatch)],
    ids=["chain", "filter", "handler"],
)
async def test_dispatching_nothing_is_no_error_anywhere(make: Callable[[Dispatcher], Dispatcher]) -> None:
    inner = Collecting()
    await make(inner).dispatch()
    assert inner.messages == []


@pytest.mark.parametrize("wrong", [Collecting, print, None], ids=["class", "function", "nothing"])
@pytest.mark.parametrize(
    "make",
    [
        lambda inner: ChainDispatcher(Collecting(), inner),
        lambda inner: FilteringDispatcher(bool, inner),
        lambda inner: TranslatingDispatcher(lambda message: message, inner),
        lambda inner: RoutingDispatcher({"orders": inner}),
    ],
    ids=["chain", "filter", "translation", "routes"],
)
def test_what_is_no_dispatcher_is_refused_at_once(make: Callable[[Any], Dispatcher], wrong: Any) -> None:
    with pytest.raises(TypeError, match="a dispatcher "):
        make(wrong)


async def test_a_chain_hands_every_message_to_each_in_their_order() -> None:
    order: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self._name = name

        async def dispatch(self, *messages: Message) -> None:
            order.extend(f"{self._name}{message.payload}" for message in messages)

    await ChainDispatcher(Named("a"), Named("b")).dispatch(a_message(1), a_message(2))
    assert order == ["a1", "a2", "b1", "b2"]


async def test_the_first_error_ends_the_chain() -> None:
    first, second, third = Collecting(), Collecting(ConnectionError("gone")), Collecting()
    with pytest.raises(ConnectionError, match="gone"):
        await ChainDispatcher(first, second, third).dispatch(a_message())
    assert [len(one.calls) for one in (first, second, third)] == [1, 1, 0]


async def test_a_chain_of_none_accepts_everything() -> None:
    await ChainDispatcher().dispatch(a_message())


async def test_a_filter_hands_on_what_it_accepts_in_one_call_and_in_order() -> None:
    inner = Collecting()
    messages = [a_message(number) for number in range(6)]
    await FilteringDispatcher(lambda message: bool(message.payload % 2), inner).dispatch(*messages)
    assert inner.calls == [tuple(messages[1::2])]


async def test_a_filter_that_accepts_none_makes_no_call() -> None:
    inner = Collecting()
    await FilteringDispatcher(lambda _: False, inner).dispatch(a_message(), a_message())
    assert inner.calls == []


async def test_a_filter_passes_on_what_the_inner_one_raises() -> None:
    message = a_message()
    inner = Collecting(PartialDispatchError({message.id: RejectedError("no")}))
    with pytest.raises(PartialDispatchError) as caught:
        await FilteringDispatcher(lambda _: True, inner).dispatch(message)
    assert list(caught.value.failures) == [message.id]


def for_the_partner(message: Message) -> Message:
    return Message({"id": message.payload}, topic=f"partner.{message.topic}")


async def test_a_translation_is_handed_on_in_one_call() -> None:
    inner = Collecting()
    await TranslatingDispatcher(for_the_partner, inner).dispatch(a_message(1), a_message(2))
    [call] = inner.calls
    assert [(message.payload, message.topic) for message in call] == [
        ({"id": 1}, "partner.orders"),
        ({"id": 2}, "partner.orders"),
    ]


class Refusing:
    """Refuses some messages of a batch, each by its own error."""

    def __init__(self, **errors: Exception) -> None:
        self._errors = errors

    async def dispatch(self, *messages: Message) -> None:
        raise PartialDispatchError(
            {message.id: self._errors[message.topic] for message in messages if message.topic in self._errors}
        )


async def test_a_failure_of_a_translation_is_reported_for_the_message_it_was_made_from() -> None:
    no, never = ConnectionError("no"), RejectedError("never")
    messages = [a_message(topic=topic) for topic in ("fine", "no", "never")]
    translating = TranslatingDispatcher(lambda message: Message(1, topic=message.topic), Refusing(no=no, never=never))
    with pytest.raises(PartialDispatchError) as caught:
        await translating.dispatch(*messages)
    assert caught.value.failures == {messages[1].id: no, messages[2].id: never}
    assert isinstance(caught.value.__cause__, PartialDispatchError)


async def test_a_failure_of_a_translation_that_kept_its_id_is_reported_under_it() -> None:
    error = ConnectionError("no")
    message = a_message(topic="no")
    translating = TranslatingDispatcher(lambda one: one.with_header("a", "b"), Refusing(no=error))
    with pytest.raises(PartialDispatchError) as caught:
        await translating.dispatch(message)
    assert caught.value.failures == {message.id: error}


async def test_translations_that_share_an_id_all_fail_when_it_fails() -> None:
    shared, error = uuid4(), ConnectionError("no")
    messages = [a_message(topic="no"), a_message(topic="no")]
    translating = TranslatingDispatcher(lambda one: Message(1, topic=one.topic, id=shared), Refusing(no=error))
    with pytest.raises(PartialDispatchError) as caught:
        await translating.dispatch(*messages)
    # Whoever is not named counts as accepted, and would be lost.
    assert caught.value.failures == {message.id: error for message in messages}


async def test_other_errors_pass_through_a_translation_as_they_are() -> None:
    error = DestinationUnavailableError("down")
    with pytest.raises(DestinationUnavailableError) as caught:
        await TranslatingDispatcher(for_the_partner, Collecting(error)).dispatch(a_message())
    assert caught.value is error


class Handler:
    """Handles messages, raising what is scripted for a payload."""

    def __init__(self, errors: dict[Any, BaseException] | None = None) -> None:
        self.handled: list[Any] = []
        self._errors = errors or {}

    async def __call__(self, message: Message) -> str:
        self.handled.append(message.payload)
        if error := self._errors.get(message.payload):
            raise error
        return "what a handler returns is nobody's business"


async def test_a_handler_gets_one_message_after_the_other() -> None:
    handler = Handler()
    await HandlerDispatcher(handler).dispatch(*(a_message(number) for number in range(3)))
    assert handler.handled == [0, 1, 2]


async def test_a_message_whose_handling_fails_does_not_stop_the_others() -> None:
    errors: dict[Any, BaseException] = {1: ConnectionError("no"), 3: RejectedError("never")}
    handler = Handler(errors)
    messages = [a_message(number) for number in range(5)]
    with pytest.raises(PartialDispatchError) as caught:
        await HandlerDispatcher(handler).dispatch(*messages)
    assert handler.handled == [0, 1, 2, 3, 4]
    assert caught.value.failures == {messages[1].id: errors[1], messages[3].id: errors[3]}


async def test_a_handler_that_is_not_asynchronous_fails_and_says_so() -> None:
    def handle(message: Message) -> None:
        """Takes it at once."""

    with pytest.raises(PartialDispatchError) as caught:
        await HandlerDispatcher(handle).dispatch(a_message())  # type: ignore[arg-type]  # the mistake to be told
    (error,) = caught.value.failures.values()
    assert "handle must be an `async def`: it returned NoneType, which cannot be awaited" in str(error)


async def test_a_destination_that_is_unavailable_stops_the_handler_and_is_the_error_of_all_that_are_left() -> None:
    error = DestinationUnavailableError("down")
    handler = Handler({0: ConnectionError("no"), 2: error})
    messages = [a_message(number) for number in range(5)]
    with pytest.raises(PartialDispatchError) as caught:
        await HandlerDispatcher(handler).dispatch(*messages)
    assert handler.handled == [0, 1, 2]
    assert set(caught.value.failures) == {messages[index].id for index in (0, 2, 3, 4)}
    assert all(caught.value.failures[message.id] is error for message in messages[2:])


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt(), SystemExit(1)], ids=repr)
async def test_what_ends_a_process_or_a_task_is_no_failure_of_a_message(error: BaseException) -> None:
    handler = Handler({0: error})
    with pytest.raises(type(error)):
        await HandlerDispatcher(handler).dispatch(a_message(0), a_message(1))
    assert handler.handled == [0]


# --- the error that names what failed -------------------------------------------------------------------


def test_a_partial_error_says_how_many_failed_and_shows_the_first() -> None:
    first, second = UUID(int=1), UUID(int=2)
    error = PartialDispatchError({first: ConnectionError("no"), second: RejectedError("never")})
    assert str(error) == f"2 of the batch failed, the first is {first}: ConnectionError: no"
    assert str(PartialDispatchError({})) == "0 of the batch failed"


def test_a_partial_error_keeps_its_own_copy_of_the_failures() -> None:
    failures: dict[UUID, BaseException] = {UUID(int=1): ConnectionError("no")}
    error = PartialDispatchError(failures)
    failures.clear()
    assert list(error.failures) == [UUID(int=1)]


def test_a_partial_error_survives_the_way_out_of_another_process() -> None:
    error = PartialDispatchError({UUID(int=1): RejectedError("never")})
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 -- our own bytes
    assert isinstance(back, PartialDispatchError)
    assert str(back) == str(error)
    assert [str(one) for one in back.failures.values()] == ["never"]


# --- the wake-up of a relay in the same process ---------------------------------------------------------


class Bell:
    """Counts how often it was rung."""

    def __init__(self) -> None:
        self.rings = 0
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self.rings += 1
        self._rung.set()

    async def wait(self) -> None:
        async with asyncio.timeout(5):
            await self._rung.wait()


def raw(connection: Connection) -> Any:
    """The connection itself, where a pool has wrapped it."""
    return getattr(connection, "_con", None) or connection


def loggers(connection: Connection) -> int:
    """How many callbacks the driver has to call after each statement."""
    return len(raw(connection)._query_loggers)  # noqa: SLF001 -- the driver shows it nowhere


def endings(connection: Connection) -> int:
    """How many callbacks the driver has to call at the end of the connection."""
    return len(raw(connection)._termination_listeners)  # noqa: SLF001 -- as above


async def a_moment(connection: Connection) -> None:
    """Some statements, for whatever a callback may do after one."""
    for _ in range(3):
        await connection.fetchval("SELECT 1")


@contextmanager
def listening(outbox: Outbox, bell: Bell) -> Iterator[None]:
    """What a relay does when it has nothing to do."""
    with outbox._wakeup.listening(bell.ring), outbox._wakeup.asleep():  # noqa: SLF001 -- what a relay does
        yield


async def test_a_listener_is_called_after_the_commit_and_not_before(connection: Connection, outbox: Outbox) -> None:
    bell = Bell()
    with listening(outbox, bell):
        async with connection.transaction():
            await OutboxDispatcher(connection, outbox).dispatch(a_message())
            await a_moment(connection)
            assert bell.rings == 0
        await bell.wait()
    assert bell.rings == 1


async def test_the_driver_is_not_watched_any_more_after_the_commit(connection: Connection, outbox: Outbox) -> None:
    bell = Bell()
    with listening(outbox, bell):
        async with connection.transaction():
            await OutboxDispatcher(connection, outbox).dispatch(a_message())
            assert loggers(connection) == 1
        await bell.wait()
        await a_moment(connection)
    assert loggers(connection) == 0
    assert bell.rings == 1


async def test_a_connection_of_a_pool_is_not_watched_any_more_after_the_commit(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    bell = Bell()
    with listening(outbox, bell):
        for rings in (1, 2):
            async with pool.acquire() as pooled, pooled.transaction():
                await OutboxDispatcher(pooled, outbox).dispatch(a_message())
            async with pool.acquire() as pooled:
                await a_moment(pooled)
                assert loggers(pooled) == 0
            assert bell.rings == rings


async def test_a_transaction_left_open_when_its_connection_goes_back_to_the_pool_is_over(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # the driver complains of it, rightly
    bell = Bell()
    with listening(outbox, bell):
        async with pool.acquire() as pooled:
            await pooled.execute("BEGIN")
            await OutboxDispatcher(pooled, outbox).dispatch(a_message())
        async with pool.acquire() as pooled:
            await a_moment(pooled)
            assert loggers(pooled) == 0
            assert await payloads(pooled, outbox) == []


async def test_the_driver_is_not_watched_any_more_after_a_rollback(connection: Connection, outbox: Outbox) -> None:
    with listening(outbox, Bell()):
        transaction = connection.transaction()
        await transaction.start()
        await OutboxDispatcher(connection, outbox).dispatch(a_message())
        await transaction.rollback()
        await a_moment(connection)
    assert loggers(connection) == 0


async def test_the_end_of_a_savepoint_is_not_the_end_of_the_transaction(connection: Connection, outbox: Outbox) -> None:
    bell = Bell()
    with listening(outbox, bell):
        async with connection.transaction():
            async with connection.transaction():
                await OutboxDispatcher(connection, outbox).dispatch(a_message())
            await a_moment(connection)
            assert bell.rings == 0
        await bell.wait()


async def test_many_dispatches_in_one_transaction_call_the_listener_once(
    connection: Connection, outbox: Outbox
) -> None:
    bell = Bell()
    with listening(outbox, bell):
        async with connection.transaction():
            for _ in range(5):
                await OutboxDispatcher(connection, outbox).dispatch(a_message())
        await bell.wait()
        await a_moment(connection)
    assert bell.rings == 1


async def test_all_listeners_are_called(connection: Connection, outbox: Outbox) -> None:
    one, two = Bell(), Bell()
    with listening(outbox, one), listening(outbox, two):
        async with connection.transaction():
            await OutboxDispatcher(connection, outbox).dispatch(a_message())
        await one.wait()
        await two.wait()


async def test_nothing_is_watched_while_all_who_listen_are_awake_and_nothing_is_missed(
    dsn: str, connection: Connection, outbox: Outbox
) -> None:
    bell, wakeup = Bell(), outbox._wakeup  # noqa: SLF001 -- what a relay does
    other = await asyncpg.connect(dsn)
    with wakeup.listening(bell.ring):
        async with connection.transaction():
            await OutboxDispatcher(connection, outbox).dispatch(a_message())
        transaction = other.transaction()
        await transaction.start()
        await OutboxDispatcher(other, outbox).dispatch(a_message())
        assert (loggers(connection), loggers(other), bell.rings) == (0, 0, 0)
        with wakeup.asleep():
            assert bell.rings == 1, "one was committed in the meantime"
        with wakeup.asleep():
            assert bell.rings == 1
            await transaction.commit()
            while bell.rings < 2:  # noqa: ASYNC110 -- it has been rung before
                await asyncio.sleep(0.001)
    assert (loggers(other), bell.rings) == (0, 2)
    await other.close()


async def test_a_commit_under_way_when_the_last_one_falls_asleep_is_not_missed(
    connection: Connection, outbox: Outbox
) -> None:
    bell, wakeup = Bell(), outbox._wakeup  # noqa: SLF001 -- what a relay does
    with wakeup.listening(bell.ring):
        await connection.execute("BEGIN")
        await OutboxDispatcher(connection, outbox).dispatch(a_message())
        committing = asyncio.ensure_future(connection.execute("COMMIT"))
        await asyncio.sleep(0)  # so it is sent
        with wakeup.asleep():
            await bell.wait()
        await committing


async def test_one_committed_while_the_next_one_of_its_connection_is_open_is_not_missed(
    connection: Connection, outbox: Outbox
) -> None:
    bell, wakeup = Bell(), outbox._wakeup  # noqa: SLF001 -- what a relay does
    with wakeup.listening(bell.ring):
        async with connection.transaction():
            await OutboxDispatcher(connection, outbox).dispatch(a_message())
        async with connection.transaction():
            await OutboxDispatcher(connection, outbox).dispatch(a_message())
            with wakeup.asleep():
                assert bell.rings == 1


async def test_who_is_awake_for_long_does_not_remember_all_who_wrote(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    bell, wakeup = Bell(), outbox._wakeup  # noqa: SLF001 -- what a relay does
    with wakeup.listening(bell.ring):
        for _ in range(200):
            async with pool.acquire() as pooled, pooled.transaction():
                await OutboxDispatcher(pooled, outbox).dispatch(a_message())
        assert len(wakeup._noted) <= 65  # noqa: SLF001 -- a leak can be seen nowhere else
        with wakeup.asleep():
            assert bell.rings == 1
    assert not wakeup._noted  # noqa: SLF001 -- as above


async def test_nothing_is_watched_when_nobody_listens(connection: Connection, outbox: Outbox) -> None:
    with listening(outbox, Bell()):
        pass
    async with connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(a_message())
        assert (loggers(connection), endings(connection)) == (0, 0)


async def test_nothing_is_watched_for_a_dispatch_of_nothing(connection: Connection, outbox: Outbox) -> None:
    with listening(outbox, Bell()):
        async with connection.transaction():
            await OutboxDispatcher(connection, outbox).dispatch()
            assert (loggers(connection), endings(connection)) == (0, 0)


async def test_a_connection_that_ends_in_its_transaction_is_not_remembered(dsn: str, outbox: Outbox) -> None:
    with listening(outbox, Bell()):
        connection = await asyncpg.connect(dsn)
        await connection.execute("BEGIN")
        await OutboxDispatcher(connection, outbox).dispatch(a_message())
        ended = asyncio.Event()
        connection.add_termination_listener(lambda _: ended.set())
        connection.terminate()
        await ended.wait()
        assert not outbox._wakeup._watched  # noqa: SLF001 -- a leak can be seen nowhere else


async def test_a_long_lived_connection_does_not_gather_callbacks(connection: Connection, outbox: Outbox) -> None:
    with listening(outbox, Bell()):
        for _ in range(20):
            async with connection.transaction():
                await OutboxDispatcher(connection, outbox).dispatch(a_message())
        await a_moment(connection)
    assert loggers(connection) == 0
    assert endings(connection) <= 1


@pytest.mark.parametrize("count", [1, 2])
async def test_a_delayed_message_is_dispatched_without_any_fresh_one(
    count: int, connection: Connection, outbox: Outbox
) -> None:
    due = datetime.now(UTC) + timedelta(hours=1)
    async with connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(*(a_message(due_at=due) for _ in range(count)))
    assert (await outbox.counts(connection)).waiting == count
