"""Hands a batch to its destination and decides, for each message that failed, what becomes of it."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Final, NamedTuple
from uuid import UUID

import anyio

from outbox._backoff import BackOff
from outbox._claims import Batch, Buried, Postponed, Suspect
from outbox._dispatcher import BEHIND, Dispatcher, awaitable
from outbox._errors import DestinationUnavailableError, OutboxError, PartialDispatchError, RejectedError, describe
from outbox._message import Message
from outbox._outbox import position_of

Upcast = Callable[[Message], Iterable[Message]]
"""Makes of one stored message those that are dispatched: none, one or many, settled as one."""

_LONGEST: Final = timedelta(days=365_000)
"""A delay that a due time can be made of, whatever a strategy of somebody's own returns."""

_UNDECIDED: Final = timedelta(minutes=1)
_LOGGER: Final = logging.getLogger("outbox")

CRASH: Final = "the process died while dispatching it"


class Failure(NamedTuple):
    """Why a message was not delivered."""

    error: BaseException
    shared: bool
    """Whether it is one error for several messages, so that one of them may be to blame alone."""


async def deliver(
    destination: Dispatcher, messages: Sequence[Message], upcast: Upcast | None, limit: timedelta, *, in_order: bool
) -> dict[int, Failure]:
    """Dispatches the messages as one batch; returns the failures by position, and none means all were accepted.

    In order, those behind one that cannot be upcast are not dispatched.
    """
    failures: dict[int, Failure] = {}
    outgoing = messages
    origin: list[tuple[UUID, int]] = []
    if upcast:
        outgoing, origin, failures = _upcast(upcast, messages, in_order=in_order)
    if not outgoing:
        return failures
    try:
        with anyio.fail_after(limit.total_seconds()):
            await awaitable(destination.dispatch(*outgoing), destination.dispatch)
    except PartialDispatchError as error:
        names = origin or [(message.id, position_of(message)) for message in messages]
        failed = {position: error.failures[name] for name, position in names if name in error.failures}
        # One error for several, as when a part of the batch went somewhere as a whole: any of them may be to blame.
        stands_for = Counter(map(id, failed.values()))
        failures |= {at: Failure(one, shared=stands_for[id(one)] > 1) for at, one in failed.items()}
    except (Exception, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and _is_cancelled():
            raise
        sent = {position for _, position in origin} or {position_of(message) for message in messages}
        failures |= {position: Failure(error, shared=len(sent) > 1) for position in sent}
    return failures


def _upcast(
    upcast: Upcast, messages: Sequence[Message], *, in_order: bool
) -> tuple[list[Message], list[tuple[UUID, int]], dict[int, Failure]]:
    outgoing: list[Message] = []
    origin: list[tuple[UUID, int]] = []
    failures: dict[int, Failure] = {}
    failed: set[int | None] = set()
    for message in messages:
        if message._lane in failed:
            failures[position_of(message)] = Failure(OutboxError(BEHIND), shared=False)
            continue
        try:
            made = list(upcast(message))
            names = [(one.id, position_of(message)) for one in made]
        except Exception as error:  # noqa: BLE001 -- a message that cannot be upcast fails by itself
            failures[position_of(message)] = Failure(error, shared=False)
            if in_order and message._lane is not None:
                failed.add(message._lane)
        else:
            outgoing += made
            origin += names
    return outgoing, origin, failures


def _is_cancelled() -> bool:
    # A destination may raise CancelledError without anybody having cancelled this task: some inner task of its own
    # was. Taken for a real one it would end the delivery with nothing settled.
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def every(kind: type[BaseException], error: BaseException) -> bool:
    """Says whether an error is of a kind, or a group of nothing but that kind."""
    if isinstance(error, BaseExceptionGroup):
        return all(every(kind, inner) for inner in error.exceptions)
    return isinstance(error, kind)


def is_unavailable(failure: Failure) -> bool:
    """Says whether the destination was away: no attempt is spent then."""
    return every(DestinationUnavailableError, failure.error)


def wait(batch: Batch, message: Message, delay: timedelta, error: BaseException) -> Postponed:
    """Has a message wait for which the destination was away: no attempt or place is lost, and a suspect stays one."""
    # The attempt of a crash's suspect was counted when it was claimed.
    attempts = message.attempts - (batch.suspect is Suspect.CRASH)
    delay = min(delay, _LONGEST)
    return Postponed(position_of(message), delay, attempts, batch.suspect, describe(error), message._lane)


def decide(batch: Batch, message: Message, failure: Failure, backoff: BackOff) -> Postponed | Buried:
    """Decides what becomes of a message that failed, other than by a destination that is away.

    Nobody dies of a failure that was shared: the first time all of the batch are tried again together, after
    that, or when there is no more time to give, each is tried alone.
    """
    position, error, rejected = position_of(message), failure.error, every(RejectedError, failure.error)
    if failure.shared and rejected:
        return Postponed(position, timedelta(), message.attempts, Suspect.BATCH, describe(error))
    # The attempt of a crash's suspect was counted when it was claimed.
    attempts = message.attempts if batch.suspect is Suspect.CRASH else message.attempts + 1
    delay = None if rejected else _delay(backoff, attempts, error)
    if delay is not None:
        alone = message.attempts > 0 if failure.shared else len(batch.messages) == 1
        return Postponed(position, delay, attempts, Suspect.BATCH if alone else None, describe(error))
    if failure.shared:
        return Postponed(position, timedelta(), message.attempts, Suspect.BATCH, describe(error))
    return Buried(position, attempts, describe(error))


def _delay(backoff: BackOff, attempts: int, error: BaseException | None) -> timedelta | None:
    try:
        delay = backoff(attempts, error)
        return None if delay is None else min(delay, _LONGEST)
    except Exception:
        # It is the same for every relay that comes after this one: so it must not end the relay.
        _LOGGER.exception("the back-off failed, the message is tried again in %s", _UNDECIDED)
        return _UNDECIDED


def decide_crashed(message: Message, backoff: BackOff) -> Buried | None:
    """Decides whether the suspect of a crash, its next attempt counted already, is given up instead of tried."""
    deaths = message.attempts - 1
    if deaths and _delay(backoff, deaths, None) is None:
        return Buried(position_of(message), deaths, describe(OutboxError(CRASH)))
    return None
