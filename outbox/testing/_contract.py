"""What every destination owes its relay, as a suite to run against its real broker."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from functools import wraps
from typing import Final
from unittest import SkipTest
from uuid import UUID

import anyio
import anyio.lowlevel

from outbox._delivery import every
from outbox._dispatcher import Dispatcher
from outbox._errors import DestinationUnavailableError, PartialDispatchError, RejectedError, describe
from outbox._message import Message

_MANY: Final = 10_000
_BATCH: Final = 100
_RECORDED_AT: Final = datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=UTC)


class Broker(ABC):
    """A broker as the contract needs it, with a place for messages that is empty: make one for your destination.

    Attributes:
        topic: Where messages arrive.
        too_large: A body of so many bytes is refused. None says that there is no such limit.
        unroutable: A topic that nobody takes. None says that every topic is taken.
        folds_names: Whether the names of headers arrive in lower case, as they do through HTTP.
    """

    topic: str = "contract"
    too_large: int | None = None
    unroutable: str | None = None
    folds_names: bool = False

    @abstractmethod
    def destination(self) -> AbstractAsyncContextManager[Dispatcher]:
        """Returns a new destination; its own time limits should be a few seconds."""

    @abstractmethod
    async def received(self, count: int) -> Sequence[Message]:
        """Waits until at least so many messages have arrived; returns all that have, again the early ones too."""

    async def stop(self) -> None:
        """Kills the broker."""
        raise SkipTest("this broker cannot be killed")

    async def start(self) -> None:
        """Starts it again, where it was, with what it had stored."""
        raise SkipTest("this broker cannot be started")

    async def freeze(self) -> None:
        """Stops the broker's process without ending it, so that nothing answers and nothing is refused."""
        raise SkipTest("this broker cannot be frozen")

    async def thaw(self) -> None:
        """Lets it go on."""
        raise SkipTest("this broker cannot be frozen")


Case = Callable[[Broker], Awaitable[None]]
"""One article of the contract; it raises `AssertionError` when it is broken, and `SkipTest` when it cannot apply."""

_cases: list[Case] = []


def _within(seconds: float) -> Callable[[Case], Case]:
    def article(function: Case) -> Case:
        @wraps(function)
        async def limited(broker: Broker) -> None:
            with anyio.fail_after(seconds):
                try:
                    await function(broker)
                except ExceptionGroup as group:  # a runner knows a failure and a skip by themselves only
                    error: Exception = group
                    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
                        error = error.exceptions[0]
                    raise error from None

        _cases.append(limited)
        return limited

    return article


_case: Final = _within(50)
_long_case: Final = _within(100)


# --- what arrives -----------------------------------------------------------------------------------------


@_case
async def a_batch_arrives_whole_and_each_key_in_its_order(broker: Broker) -> None:
    batch = _messages(broker.topic, 200, keys=5)
    async with broker.destination() as destination:
        await destination.dispatch(*batch)
        arrived = await _arrival(broker, batch)
    for key in {message.key for message in batch}:
        assert [one.id for one in arrived if one.key == key] == [one.id for one in batch if one.key == key]


@_case
async def without_messages_nothing_is_sent(broker: Broker) -> None:
    (last,) = _messages(broker.topic, 1)
    async with broker.destination() as destination:
        await destination.dispatch()
        await destination.dispatch(last)
        assert [message.id for message in await _arrival(broker, [last])] == [last.id]


@_case
async def every_part_arrives_byte_for_byte(broker: Broker) -> None:
    name = "mixed-case.name" if broker.folds_names else "Mixed-Case.Name"
    headers = {
        "type": "order.placed/v1",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate": "vendor=value,other=a:b;c",
        name: "plain",
        "spaces": "  at both ends ",
        "percent": "100 % and %41 and %",
        "quotes": "\"'\\`{}[]<>&",
        "lines": "one\r\ntwo\n\tthree\x7f\x01",
        "words": "Grüße, 你好, \N{WAVING HAND SIGN}",
        "empty": "",
    }
    bodies = [b"", b"null", bytes(range(256)), '{"Grüße": "\N{WAVING HAND SIGN}"}'.encode(), b"x" * 50_000]
    keys = ["order-1", "Grüße 100 % \N{WAVING HAND SIGN}", " a key\r\n", "k" * 100, None]
    batch = [
        Message.from_body(body, topic=broker.topic, key=key, headers=headers, recorded_at=_RECORDED_AT)
        for body, key in zip(bodies, keys, strict=True)
    ]
    async with broker.destination() as destination:
        await destination.dispatch(*batch)
        await _arrival(broker, batch)


@_case
async def a_message_of_nothing_but_a_topic_arrives(broker: Broker) -> None:
    message = Message(None, topic=broker.topic, recorded_at=_RECORDED_AT)
    async with broker.destination() as destination:
        await destination.dispatch(message)
        (arrived,) = await _arrival(broker, [message])
    assert (arrived.key, dict(arrived.headers), arrived.payload) == (None, {}, None)


@_long_case
async def ten_thousand_arrive_and_none_is_lost(broker: Broker) -> None:
    messages = _messages(broker.topic, _MANY, keys=100)
    async with broker.destination() as destination:
        await _deliver_all(destination, messages, at_once=4)
        await _arrival(broker, messages)


# --- what does not ----------------------------------------------------------------------------------------


@_case
async def what_is_too_large_is_rejected_and_nothing_else(broker: Broker) -> None:
    if broker.too_large is None:
        raise SkipTest("this broker takes every size")
    huge = Message.from_body(b"x" * broker.too_large, topic=broker.topic, recorded_at=_RECORDED_AT)
    before, after = _messages(broker.topic, 2)
    async with broker.destination() as destination:
        failures = await _failures(destination, before, huge, after)
        assert set(failures) == {huge.id}, failures
        assert every(RejectedError, failures[huge.id]), describe(failures[huge.id])
        await _arrival(broker, [before, after])
        (again,) = _messages(broker.topic, 1)  # the destination is well
        await destination.dispatch(again)
        await _arrival(broker, [before, after, again])


@_case
async def what_is_beyond_some_limit_is_not_taken_for_a_broker_that_is_down(broker: Broker) -> None:
    # It would be sent for ever, and the others of its batch with it. A broker may cut the connection over it.
    if broker.too_large is None:
        raise SkipTest("this broker takes every size")
    most = broker.too_large - 1
    sent: list[Message] = []
    async with broker.destination() as destination:
        for odd in (
            Message.from_body(b"x" * most, topic=broker.topic, headers={"besides": "the body"}),
            Message.from_body(b"x", topic=broker.topic, headers={"long": "x" * most}),
            Message.from_body(b"x", topic=f"{broker.topic}.{'x' * 5_000}"),
        ):
            before, after = _messages(broker.topic, 2)
            failures = await _failures(destination, before, odd, after)
            for error in failures.values():
                assert not every(DestinationUnavailableError, error), describe(error)
            # A connection that was cut is nobody's in particular: the others are tried again.
            await _deliver_all(destination, [one for one in (before, after) if one.id in failures])
            sent += (before, odd, after)
            await _arrival(broker, [before, after], others=sent)


@_case
async def what_nobody_takes_is_a_failure_of_its_own(broker: Broker) -> None:
    if broker.unroutable is None:
        raise SkipTest("this broker takes every topic")
    (astray,) = _messages(broker.unroutable, 1)
    async with broker.destination() as destination:
        failures = await _failures(destination, astray)
        assert set(failures) == {astray.id}, failures
        # Somebody may make the topic tomorrow, so it is not rejected; and the broker is not down.
        error = failures[astray.id]
        assert not every(DestinationUnavailableError, error), describe(error)
        (again,) = _messages(broker.topic, 1)  # the destination is well
        await destination.dispatch(again)
        await _arrival(broker, [again])


@_case
async def of_half_a_batch_that_is_refused_the_other_half_arrives(broker: Broker) -> None:
    good = _messages(broker.topic, 20)
    bad = [_refused(broker, number) for number in range(20)]
    async with broker.destination() as destination:
        batch = [message for pair in zip(good, bad, strict=True) for message in pair]
        failures = await _failures(destination, *batch)
        assert set(failures) == {message.id for message in bad}, failures
        arrived = await _arrival(broker, good)
    assert not {message.id for message in arrived} & set(failures)


# --- when the broker is not well ----------------------------------------------------------------------------


@_case
async def a_broker_that_is_down_at_the_start_is_unavailable_until_it_is_up(broker: Broker) -> None:
    batch = _messages(broker.topic, 10)
    async with broker.destination() as destination:
        await broker.stop()
        try:
            await _assert_unavailable(destination, batch)
        finally:
            await broker.start()
        await _deliver_all(destination, batch)
        await _arrival(broker, batch)


@_case
async def a_broker_that_goes_between_two_batches_is_unavailable_until_it_is_back(broker: Broker) -> None:
    first, then = _messages(broker.topic, 10), _messages(broker.topic, 10)
    async with broker.destination() as destination:
        await destination.dispatch(*first)
        await broker.stop()
        try:
            await _assert_unavailable(destination, then)
        finally:
            await broker.start()
        await _deliver_all(destination, then)
        await _arrival(broker, [*first, *then])


@_long_case
async def a_broker_that_is_killed_among_ten_thousand_loses_none(broker: Broker) -> None:
    messages = _messages(broker.topic, _MANY, keys=100)
    async with broker.destination() as destination, anyio.create_task_group() as tasks:
        progress = _Progress()
        tasks.start_soon(_deliver_all, destination, messages, 4, progress)
        await progress.half.wait()
        await broker.stop()
        await broker.start()
    await _arrival(broker, messages)


@_case
async def a_broker_that_does_not_answer_is_unavailable(broker: Broker) -> None:
    first, then = _messages(broker.topic, 10), _messages(broker.topic, 10)
    async with broker.destination() as destination:
        await destination.dispatch(*first)
        await broker.freeze()
        try:
            await _assert_unavailable(destination, then)
        finally:
            await broker.thaw()
        await _deliver_all(destination, then)
        await _arrival(broker, [*first, *then])


@_case
async def a_cancelled_batch_leaves_the_destination_well(broker: Broker) -> None:
    cut, whole = _messages(broker.topic, 500), _messages(broker.topic, 50)
    async with broker.destination() as destination:
        (first,) = _messages(broker.topic, 1)
        await destination.dispatch(first)
        for checkpoints in range(3):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_deliver_all, destination, cut)
                for _ in range(checkpoints + 1):
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
        await _deliver_all(destination, whole)
        await _arrival(broker, [first, *whole], others=cut)


CONTRACT: Final = tuple(_cases)
"""The articles of the contract, to be run each with a `Broker` of its own."""


# --- helpers ------------------------------------------------------------------------------------------------


class _Progress:
    """Tells when half of the work is done."""

    def __init__(self) -> None:
        self.half = anyio.Event()


def _messages(topic: str, count: int, *, keys: int = 0) -> list[Message]:
    return [
        Message(
            {"number": number},
            topic=topic,
            key=f"key-{number % keys}" if keys else None,
            headers={"number": str(number)},
            recorded_at=datetime.now(UTC),
        )
        for number in range(count)
    ]


def _refused(broker: Broker, number: int) -> Message:
    if broker.unroutable is not None:
        return Message({"astray": number}, topic=broker.unroutable)
    if broker.too_large is not None:
        return Message.from_body(b"x" * broker.too_large, topic=broker.topic)
    raise SkipTest("this broker refuses nothing")


async def _failures(destination: Dispatcher, *batch: Message) -> dict[UUID, BaseException]:
    """Dispatches, and returns the error of each message that failed."""
    try:
        await destination.dispatch(*batch)
    except PartialDispatchError as error:
        return error.failures
    except Exception as error:  # noqa: BLE001 -- whatever it is, it says that none was accepted
        return {message.id: error for message in batch}
    return {}


async def _assert_unavailable(destination: Dispatcher, batch: Sequence[Message]) -> None:
    failures = await _failures(destination, *batch)
    assert set(failures) == {message.id for message in batch}, failures
    for error in failures.values():
        assert every(DestinationUnavailableError, error), describe(error)


async def _deliver_all(
    destination: Dispatcher, messages: Sequence[Message], at_once: int = 1, progress: _Progress | None = None
) -> None:
    """Delivers as a relay does, in batches, each until all of it was accepted."""
    batches = [messages[start : start + _BATCH] for start in range(0, len(messages), _BATCH)]
    half = len(batches) // 2

    async def work() -> None:
        while batches:
            left = batches.pop(0)
            if progress and len(batches) < half:
                progress.half.set()
            while failures := await _failures(destination, *left):
                # Only a broker that is down or coming up can be the reason.
                rejected = [error for error in failures.values() if every(RejectedError, error)]
                assert not rejected, describe(rejected[0])
                left = [message for message in left if message.id in failures]
                await anyio.sleep(0.05)  # as a relay backs off; that a broker is back has no event

    async with anyio.create_task_group() as tasks:
        for _ in range(at_once):
            tasks.start_soon(work)


async def _arrival(broker: Broker, wanted: Sequence[Message], *, others: Iterable[Message] = ()) -> list[Message]:
    """Waits for these messages, checks that they came as they were sent, and returns them without duplicates."""
    sent = {message.id: message for message in wanted}
    allowed = sent.keys() | {message.id for message in others}
    arrived = list(await broker.received(len(sent)))
    while sent.keys() - {message.id for message in arrived}:
        arrived = list(await broker.received(len(arrived) + 1))
    first: dict[UUID, Message] = {}
    for message in arrived:
        assert message.id in allowed, f"{message!r} was never sent"
        first.setdefault(message.id, message)
        if message.id in sent:
            _assert_same(message, sent[message.id])
    return [message for message in first.values() if message.id in sent]


def _assert_same(arrived: Message, sent: Message) -> None:
    for name in ("topic", "key", "headers", "body", "recorded_at"):
        there, here = getattr(arrived, name), getattr(sent, name)
        assert there == here, f"{sent!r}: {name} was {here!r:.500} when sent and {there!r:.500} when it arrived"
