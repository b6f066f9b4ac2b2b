"""A relay and all that can be set about it, as its author types it; mypy checks it, nobody runs it."""

import asyncio
from collections.abc import Iterable
from datetime import timedelta
from random import Random
from typing import Any, assert_never, assert_type

import anyio
import asyncpg

from outbox import (
    BackOff,
    BatchDelivered,
    CommitStrategy,
    DatabaseLost,
    DestinationDown,
    DestinationPartlyDown,
    DestinationUp,
    Dispatcher,
    Event,
    ExponentialBackOff,
    FailImmediately,
    FibonacciBackOff,
    LinearBackOff,
    Message,
    MessageDied,
    MessageFailed,
    Notifier,
    NoWaiting,
    Outbox,
    Relay,
    RelayAtWork,
    RelayFenced,
    RelaysDied,
    RelayStandsBy,
    RelayStarted,
    RelayStopped,
    SlotsOwned,
    WriterLate,
    full_jitter,
    half_jitter,
    jitter_after,
    no_jitter,
    scattered_jitter,
)


def split(message: Message) -> Iterable[Message]:
    yield message
    yield message.with_header("copy", "1")


def everything_that_can_be_set(outbox: Outbox, pool: "asyncpg.Pool[Any]", destination: Dispatcher) -> None:
    relay = Relay(
        outbox,
        pool,
        destination,
        batch_size=50,
        concurrency=2,
        commit=CommitStrategy.MARK,
        keep=timedelta(days=1),
        backoff=ExponentialBackOff(initial=timedelta(milliseconds=100), max_tries=5, jitter=full_jitter),
        destination_backoff=NoWaiting(),
        order="none",
        upcast=split,
        hooks=[told],
        dispatch_timeout=timedelta(seconds=5),
        lease=timedelta(seconds=5),
        grace=timedelta(seconds=5),
        poll_interval=timedelta(milliseconds=50),
        listen=True,
    )
    assert_type(relay, Relay)
    Relay(outbox, pool, destination, 100)  # type: ignore[call-arg]  # settings are given by name
    Relay(outbox, pool, print)  # type: ignore[arg-type]
    Relay(outbox, pool, destination, poll_interval=0.1)  # type: ignore[arg-type]  # a duration says its unit
    Relay(outbox, pool, destination, order="random")  # type: ignore[arg-type]
    Relay(outbox, pool, destination, commit="delete")  # type: ignore[arg-type]
    Relay(outbox, pool, destination, upcast=lambda message: message)  # type: ignore[arg-type, return-value]


async def all_ways_to_run_it(relay: Relay, outbox: Outbox, pool: "asyncpg.Pool[Any]") -> None:
    assert_type(await relay.run_once(), int)
    task = asyncio.create_task(relay.run())
    await relay.stop()
    await task
    async with anyio.create_task_group() as tasks:
        await tasks.start(relay.run)
        await tasks.start(Notifier(outbox, pool, debounce=timedelta(milliseconds=5)).run)
        tasks.cancel_scope.cancel()


def told(event: Event) -> None:  # noqa: C901, PLR0915 -- one case for each
    """A hook that knows every event: a new one is found here by the type checker."""
    match event:
        case RelayStarted() | DestinationUp() | RelayFenced() | RelayAtWork():
            pass
        case RelayStopped(given_back=given_back):
            assert_type(given_back, int)
        case BatchDelivered(messages=messages, seconds=seconds):
            assert_type(messages, tuple[Message, ...])
            assert_type(seconds, float)
        case MessageFailed(message=message, error=error, attempts=attempts, delay=delay):
            assert_type(message, Message)
            assert_type(error, BaseException)
            assert_type(attempts, int)
            assert_type(delay, timedelta)
        case MessageDied(message=message, error=error, attempts=attempts):
            assert_type(message, Message)
            assert_type(error, BaseException)
            assert_type(attempts, int)
        case DestinationDown(error=error, delay=delay) | DatabaseLost(error=error, delay=delay):
            assert_type(error, BaseException)
            assert_type(delay, timedelta)
        case DestinationPartlyDown(messages=messages, error=error, delay=delay):
            assert_type(messages, tuple[Message, ...])
            assert_type(delay, timedelta)
        case RelaysDied(relays=relays, messages=count):
            assert_type(relays, int)
            assert_type(count, int)
        case RelayStandsBy(order=order):
            assert_type(order, str)
        case SlotsOwned(slots=slots):
            assert_type(slots, int)
        case WriterLate(pid=pid, age=age, passed_over=passed_over):
            assert_type(pid, int | None)
            assert_type(age, timedelta)
            assert_type(passed_over, bool)
        case _:
            assert_never(event)


def my_own(attempts: int, error: BaseException | None) -> timedelta | None:
    return timedelta(seconds=attempts) if isinstance(error, OSError) else None


def what_is_a_back_off() -> None:
    second = timedelta(seconds=1)
    every: list[BackOff] = [
        my_own,
        ExponentialBackOff(),
        LinearBackOff(),
        FibonacciBackOff(),
        NoWaiting(max_tries=3),
        FailImmediately(),
        LinearBackOff(jitter=half_jitter),
        LinearBackOff(jitter=no_jitter),
        LinearBackOff(jitter=scattered_jitter(0.25)),
        LinearBackOff(jitter=jitter_after(second, full_jitter)),
    ]
    for backoff in every:
        assert_type(backoff(1, OSError()), timedelta | None)
    assert_type(full_jitter(second, Random(1)), timedelta)
    ExponentialBackOff(initial=5)  # type: ignore[arg-type]  # a duration says its unit
