"""Destinations that collect or fail, and a relay that runs until nothing is left to do."""

import asyncio
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any, Final
from uuid import UUID

from outbox._dispatcher import Dispatcher
from outbox._errors import PartialDispatchError
from outbox._events import BatchDelivered, Event, MessageDied, MessageFailed
from outbox._message import Message
from outbox._outbox import Outbox, Pool
from outbox._relay import Relay

Step = BaseException | type[BaseException] | Callable[[tuple[Message, ...]], BaseException | None] | None
"""What `FailingDispatcher` does with one call: raise this, raise what the function answers, or accept (None)."""

Expected = Message | tuple[str, Any] | Callable[[Message], bool]
"""How `assert_dispatched` knows a message: by an example, by topic and payload, or by a question that it answers."""

_NOTHING: Final = object()


class CollectingDispatcher:
    """Accepts every message and keeps it, in the order of arrival.

    Give it to your domain code in place of an `OutboxDispatcher`, or to a `Relay` as its destination.

    Attributes:
        messages: All messages, in order.
        batches: The same, one tuple for each call.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.batches: list[tuple[Message, ...]] = []
        self._arrived = asyncio.Event()

    async def dispatch(self, *messages: Message) -> None:
        """Keeps the messages; with none it does nothing."""
        if messages:
            self.messages += messages
            self.batches.append(messages)
            self._arrived.set()
            self._arrived = asyncio.Event()

    async def wait_for(self, count: int) -> list[Message]:
        """Waits until at least so many messages were collected, and returns all there are by then.

        It wakes when they arrive, without polling. It sets no time limit: your test has one, or
        `asyncio.timeout` gives it one.
        """
        while len(self.messages) < count:
            await self._arrived.wait()
        return list(self.messages)

    def clear(self) -> None:
        """Forgets everything collected so far."""
        self.messages.clear()
        self.batches.clear()


class FailingDispatcher:
    """Fails by a script: each call takes the next step, and after the last one every call is accepted.

    A step is an exception to raise, or None to accept. It may be a function of the batch that returns either,
    and with `PartialDispatchError` a part fails while the rest is accepted:

        def refuse_odd_orders(messages):
            return PartialDispatchError({m.id: ValueError("odd") for m in messages if m.payload["order"] % 2})

        FailingDispatcher([TimeoutError, None, refuse_odd_orders])  # fails, accepts, accepts a part, accepts …
        FailingDispatcher(itertools.repeat(refuse_odd_orders))      # the same for ever

    Args:
        script: The steps; an endless iterable will do.
        inner: Gets what is accepted. None drops it.

    Attributes:
        calls: The messages of each call, accepted or not.
    """

    def __init__(self, script: Iterable[Step], inner: Dispatcher | None = None) -> None:
        self.calls: list[tuple[Message, ...]] = []
        self._script = iter(script)
        self._inner = inner

    async def dispatch(self, *messages: Message) -> None:
        """Takes the next step of the script; with no messages it takes none."""
        if not messages:
            return
        self.calls.append(messages)
        step = next(self._script, None)
        error = step(messages) if callable(step) and not isinstance(step, type) else step
        accepted = messages if error is None else ()
        if isinstance(error, PartialDispatchError):
            accepted = tuple(message for message in messages if message.id not in error.failures)
        if accepted and self._inner is not None:
            await self._inner.dispatch(*accepted)
        if error is not None:
            raise error


def assert_dispatched(dispatched: CollectingDispatcher | Iterable[Message], *expected: Expected) -> None:
    """Asserts that these messages were dispatched, in this order, and no others; with none expected, none at all.

        assert_dispatched(dispatcher, ("orders.placed", {"order": 1}), lambda message: message.key == "order-1")

    Args:
        dispatched: What collected the messages, or the messages.
        expected: For each message `(topic, payload)`, a function that says whether this is the one, or a `Message`
            like it: of the same topic, key, headers and payload, while ids and times may differ.

    Raises:
        AssertionError: When they differ; it shows both, side by side.
    """
    __tracebackhide__ = True  # pytest shows the line that asserts, not this one
    messages = dispatched.messages if isinstance(dispatched, CollectingDispatcher) else list(dispatched)
    pairs = list(zip_longest(expected, messages, fillvalue=_NOTHING))
    if not all(_matches(wanted, message) for wanted, message in pairs):
        lines = [_line(number, wanted, message) for number, (wanted, message) in enumerate(pairs, 1)]
        count = f"{len(expected)} expected, {len(messages)} dispatched"
        raise AssertionError("\n".join([f"the dispatched messages are not the expected ones ({count}):", *lines]))


async def drain(outbox: Outbox, pool: Pool, destination: Dispatcher | None = None, **options: Any) -> list[Message]:
    """Delivers all that is pending and due, and returns what was delivered, in the order of delivery.

    It runs a relay in the foreground, batch by batch, until there is nothing that it has not tried. What fails is
    tried again if it is due again at once and still makes progress; it never waits for a due time, nor for a
    destination that is down, so it comes to an end whatever fails.

    Args:
        outbox: The table and codec.
        pool: An asyncpg pool of at least two connections.
        destination: Where the messages go. None accepts them all.
        options: The other arguments of `Relay`.

    Raises:
        OutboxError: As `Relay.run_once` does.
    """
    delivered: list[Message] = []
    progress: set[tuple[type[Event], UUID]] = set()

    def watch(event: Event) -> None:
        if isinstance(event, BatchDelivered):
            delivered.extend(event.messages)
        elif isinstance(event, MessageFailed | MessageDied):
            progress.add((type(event), event.message.id))

    accepting = CollectingDispatcher() if destination is None else destination
    relay = Relay(outbox, pool, accepting, hooks=(*options.pop("hooks", ()), watch), **options)
    while True:
        before = len(delivered), len(progress)
        await relay.run_once()
        if (len(delivered), len(progress)) == before:
            return delivered


def _matches(wanted: object, message: object) -> bool:
    if not isinstance(message, Message):
        return False
    if isinstance(wanted, Message):
        return _content(wanted) == _content(message)
    if isinstance(wanted, tuple):
        return wanted == (message.topic, message.payload)
    return callable(wanted) and bool(wanted(message))


def _content(message: Message) -> tuple[object, ...]:
    # The codec adds the header `type` on the way, so it makes no difference here, as in comparing messages.
    return message.topic, message.key, {**message.headers, "type": ""}, message.payload


def _line(number: int, wanted: object, message: object) -> str:
    if _matches(wanted, message):
        return f"  {number}. as expected: {_shown(message)}"
    return f"  {number}. expected:   {_shown(wanted)}\n     dispatched: {_shown(message)}"


def _shown(one: object) -> str:
    if one is _NOTHING:
        return "nothing"
    if isinstance(one, Message):
        extras = {"key": one.key, "headers": dict(one.headers)}
        return " ".join(
            [one.topic, repr(one.payload), *(f"{name}={extra!r}" for name, extra in extras.items() if extra)]
        )
    if isinstance(one, tuple) and len(one) == 2:  # noqa: PLR2004 -- topic and payload
        return f"{one[0]} {one[1]!r}"
    return f"one for which {getattr(one, '__qualname__', repr(one))} is true" if callable(one) else repr(one)
