"""The seam of this library, `Dispatcher`, and the dispatchers that are no broker's."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from inspect import isawaitable
from typing import Final, Protocol, assert_never, runtime_checkable
from uuid import UUID

import asyncpg

from outbox._errors import DestinationUnavailableError, NotInTransactionError, OutboxError, PartialDispatchError
from outbox._message import Message
from outbox._outbox import Connection, Outbox, require_connection
from outbox._queries import Ordering

BEHIND: Final = "not tried, since one before it in its order failed"
"""Why a message failed that was not tried."""

_MANY_TOPICS: Final = 10_000
"""How many topics a route is remembered for; they may be made of names without end."""

_INSIDE: Final = "Dispatch inside `async with connection.transaction():`, together with the rows the message speaks of"

Decorator = Callable[[Message], Message]
"""Makes a changed copy of a message before it is written: a default header, a trace context."""


@runtime_checkable
class Dispatcher(Protocol):
    """Takes messages: on the writer's side into the outbox, on the relay's side to their destination.

    A destination answers for its batch: it returns when all were accepted, raises `PartialDispatchError` for
    those that were not, and anything else when none was. `RejectedError` says "never", and
    `DestinationUnavailableError` "not now, and not the message's fault".
    """

    async def dispatch(self, *messages: Message) -> None:
        """Takes these messages, in this order; with none it does nothing."""
        ...


def require_dispatchers(*candidates: object) -> None:
    """Raises `TypeError` for a function, the class of a dispatcher, and whatever else has no `dispatch` to call."""
    for one in candidates:
        if isinstance(one, type):  # called on the class, the first message would be taken for `self`, and lost
            raise TypeError(f"a dispatcher is an object, not its class: {one.__name__}(…)")
        if not callable(getattr(one, "dispatch", None)):
            raise TypeError(
                f"a dispatcher has `async def dispatch(self, *messages)`, {type(one).__name__} has none; "
                "HandlerDispatcher(function) makes one of a function that takes one message"
            )


def awaitable(answer: object, whose: object) -> Awaitable[object]:
    """Returns what a `dispatch` or a handler answered, to be awaited; raises when it was no `async def`."""
    if not isawaitable(answer):
        name = getattr(whose, "__qualname__", type(whose).__qualname__)
        raise TypeError(f"{name} must be an `async def`: it returned {type(answer).__name__}, which cannot be awaited")
    return answer


class OutboxDispatcher:
    """Writes messages into the outbox, inside the transaction that is open on its connection.

    They are delivered if and only if that transaction commits; a savepoint rolled back takes its own along.
    It is cheap: make one for each request.

    Args:
        connection: An asyncpg connection, or one acquired from a pool, with an open transaction.
        outbox: The table and codec.
        decorators: Applied to each message in this order, the result of one going into the next.
    """

    def __init__(
        self,
        connection: Connection,
        outbox: Outbox = Outbox(),  # noqa: B008 -- one for all: it has no state but who wants to be woken
        *,
        decorators: Iterable[Decorator] = (),
    ) -> None:
        self._connection = connection
        self._outbox = outbox
        self._decorators = tuple(decorators)

    async def dispatch(self, *messages: Message) -> None:
        """Writes the messages in their order: one statement for one, one for many.

        Raises:
            NotInTransactionError: When no transaction is open; nothing was written.
            CodecError: When a payload cannot be encoded; nothing was written and the transaction is unharmed.
            SchemaError: When the table does not exist.
            OutboxError: When the database refuses, with the driver's error as its cause.
        """
        if not messages:
            return
        require_transaction(self._connection, messages[0], "written", _INSIDE)
        for decorate in self._decorators:
            messages = tuple(map(decorate, messages))
        await self._outbox.persist(self._connection, *messages)
        self._outbox._wakeup.wrote(self._connection)


def require_transaction(connection: Connection, message: Message | UUID, done: str, remedy: str) -> None:
    """Raises unless a transaction is open on the connection, in which the message would be written or accepted."""
    if not hasattr(connection, "is_in_transaction"):  # as it always has: so the text is not made for nothing
        require_connection(connection, _refused(message, done))
    try:
        closed, open_transaction = connection.is_closed(), connection.is_in_transaction()
    except asyncpg.InterfaceError as error:
        raise OutboxError(f"{_refused(message, done)}: {error}") from error
    if closed:
        raise OutboxError(f"{_refused(message, done)}: the connection is closed")
    if not open_transaction:
        raise NotInTransactionError(f"{_refused(message, done)}: no transaction is open on this connection. {remedy}")


def _refused(message: Message | UUID, done: str) -> str:
    return f"message {message.id if isinstance(message, Message) else message} was not {done}"


class ChainDispatcher:
    """Hands every message to each of several dispatchers, in their order.

    What one of them refuses by name goes no further; the rest goes on. Any other error ends the chain. As a relay's
    destination it is retried as a whole: those before the one that failed see the message again.
    """

    def __init__(self, *dispatchers: Dispatcher) -> None:
        require_dispatchers(*dispatchers)
        self._dispatchers = dispatchers

    async def dispatch(self, *messages: Message) -> None:
        """Hands the messages on."""
        failures: dict[UUID, BaseException] = {}
        for dispatcher in self._dispatchers:
            try:
                await dispatcher.dispatch(*messages)
            except PartialDispatchError as error:
                failures |= error.failures
                messages = tuple(message for message in messages if message.id not in error.failures)
        if failures:
            raise PartialDispatchError(failures)


class FilteringDispatcher:
    """Hands on the messages that a predicate accepts; the others count as accepted and go no further."""

    def __init__(self, accepts: Callable[[Message], bool], inner: Dispatcher) -> None:
        require_dispatchers(inner)
        self._accepts = accepts
        self._inner = inner

    async def dispatch(self, *messages: Message) -> None:
        """Hands on those that are accepted, in one call, or makes none when there are none."""
        if accepted := tuple(filter(self._accepts, messages)):
            await self._inner.dispatch(*accepted)


class RoutingDispatcher:
    """Hands each message to the dispatcher of its topic: the parts of a batch go their ways at the same time.

    A part that fails as a whole, or is unavailable, holds back none of the others, neither in its batch nor later. But
    each waits for the slowest of its batch: one that may be slow by itself needs a table of its own (see
    `PostgresDispatcher`). An order is kept within each dispatcher, not from one to another.

    Args:
        routes: A dispatcher for each topic, or pattern of topics as in `fnmatch`: `orders.*` takes all that begin with
            "orders.". The first that fits is taken.
        default: Takes what fits none. None makes of it a failure, which is tried again: a route may come.
    """

    def __init__(self, routes: Mapping[str, Dispatcher], *, default: Dispatcher | None = None) -> None:
        require_dispatchers(*routes.values(), *([] if default is None else [default]))
        self._routes = tuple(routes.items())
        self._default = default
        self._known: dict[str, Dispatcher | None] = {}

    async def dispatch(self, *messages: Message) -> None:
        """Hands the messages on, in one call for each dispatcher that is concerned."""
        failures: dict[UUID, BaseException] = {}
        parts: dict[int, tuple[Dispatcher, list[Message]]] = {}
        for message in messages:
            if dispatcher := self._route(message.topic):
                parts.setdefault(id(dispatcher), (dispatcher, []))[1].append(message)
            else:
                failures[message.id] = OutboxError(f"no route takes the topic {message.topic!r}")
        # Every answer is read, also that of one that something inside cancelled: unread it would count as accepted.
        calls = [dispatcher.dispatch(*part) for dispatcher, part in parts.values()]
        for (_, part), answer in zip(parts.values(), await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(answer, PartialDispatchError):
                failures |= answer.failures
            elif isinstance(answer, BaseException):
                failures |= dict.fromkeys([message.id for message in part], answer)
        if failures:
            raise PartialDispatchError(failures)

    def _route(self, topic: str) -> Dispatcher | None:
        if topic not in self._known:
            fits = (dispatcher for pattern, dispatcher in self._routes if fnmatchcase(topic, pattern))
            if len(self._known) >= _MANY_TOPICS:
                self._known.clear()
            self._known[topic] = next(fits, self._default)
        return self._known[topic]


class TranslatingDispatcher:
    """Hands on what a function makes of each message: an anti-corruption layer.

    A failure that the inner dispatcher reports for a translation is reported for the message it was made from.
    """

    def __init__(self, translate: Callable[[Message], Message], inner: Dispatcher) -> None:
        require_dispatchers(inner)
        self._translate = translate
        self._inner = inner

    async def dispatch(self, *messages: Message) -> None:
        """Translates all and hands them on in one call."""
        translated = tuple(map(self._translate, messages))
        try:
            await self._inner.dispatch(*translated)
        except PartialDispatchError as error:
            # Two translations may share an id; then both of their origins failed.
            failures = {
                old.id: error.failures[new.id]
                for old, new in zip(messages, translated, strict=True)
                if new.id in error.failures
            }
            raise PartialDispatchError(failures) from error


class HandlerDispatcher:
    """Makes a dispatcher from an `async def handle(message)`, called for one message after the other.

    A message whose handling raises does not stop the others: all failures come together in one
    `PartialDispatchError`. `DestinationUnavailableError` does stop them: the rest would meet the same.

    Args:
        handle: Takes one message.
        order: That of the relay. Those behind a failure, of its key or with "total" all, are then not handled, and
            fail with it.
    """

    def __init__(self, handle: Callable[[Message], Awaitable[object]], *, order: Ordering = "none") -> None:
        self._handle = handle
        self._order = order

    async def dispatch(self, *messages: Message) -> None:
        """Handles each message in turn."""
        failures: dict[UUID, BaseException] = {}
        failed: set[object] = set()
        for index, message in enumerate(messages):
            lane = self._lane(message)
            if lane in failed:
                failures[message.id] = OutboxError(BEHIND)
                continue
            try:
                await awaitable(self._handle(message), self._handle)
            except DestinationUnavailableError as error:
                failures |= {untried.id: error for untried in messages[index:]}
                break
            except Exception as error:  # noqa: BLE001 -- whatever a handler raises is this message's failure
                failures[message.id] = error
                failed |= {lane} - {None}
        if failures:
            raise PartialDispatchError(failures)

    def _lane(self, message: Message) -> object:
        """Returns what stands still with a failure of this message; None is nothing."""
        match self._order:
            case "none":
                return None
            case "key":
                return message.key
            case "total":
                return "all"
            case _:
                assert_never(self._order)
