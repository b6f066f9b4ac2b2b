"""What a relay tells its hooks: small frozen values, made only when a hook is there to receive them."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from outbox._message import Message


@dataclass(frozen=True, slots=True)
class RelayStarted:
    """The relay is registered and begins to claim."""


@dataclass(frozen=True, slots=True)
class RelayStopped:
    """The relay has stopped."""

    given_back: int
    """Messages it held and had not delivered; they are due at once, for any relay."""


@dataclass(frozen=True, slots=True)
class BatchDelivered:
    """The destination accepted messages; they are settled next."""

    messages: tuple[Message, ...]
    seconds: float
    """How long the destination took for the whole batch."""


@dataclass(frozen=True, slots=True)
class MessageFailed:
    """A delivery failed and will be tried again."""

    message: Message
    error: BaseException
    attempts: int
    """How many have failed so far, this one included if it counted."""
    delay: timedelta
    """How long it waits for the next one."""


@dataclass(frozen=True, slots=True)
class MessageDied:
    """A message was given up and becomes a dead letter."""

    message: Message
    error: BaseException
    attempts: int


@dataclass(frozen=True, slots=True)
class DestinationDown:
    """The destination said that it is unavailable; nothing is dispatched until the delay is over."""

    error: BaseException
    delay: timedelta


@dataclass(frozen=True, slots=True)
class DestinationPartlyDown:
    """The destination was unavailable for these, while it takes others: they wait by themselves, and spend no attempt.

    A topic or a queue is away, or one of several brokers. What was refused is tried again after the delay.
    """

    messages: tuple[Message, ...]
    error: BaseException
    delay: timedelta


@dataclass(frozen=True, slots=True)
class DestinationUp:
    """The destination accepts again."""


@dataclass(frozen=True, slots=True)
class DatabaseLost:
    """The database refused or did not answer; the relay tries again after the delay, for ever."""

    error: BaseException
    delay: timedelta


@dataclass(frozen=True, slots=True)
class RelaysDied:
    """Other relays stopped renewing their lease; what they held is tried again, one message at a time."""

    relays: int
    messages: int


@dataclass(frozen=True, slots=True)
class RelayFenced:
    """This relay could not renew its lease in time, another took over what it held; it starts anew."""


@dataclass(frozen=True, slots=True)
class RelayStandsBy:
    """Relays of another order are at work on this table; this one begins when they have gone."""

    order: str
    """The order of this one."""


@dataclass(frozen=True, slots=True)
class RelayAtWork:
    """This relay stood by and is at work now: those of the other order have gone."""


@dataclass(frozen=True, slots=True)
class SlotsOwned:
    """Where an order is kept, this relay now owns another number of slots than before."""

    slots: int
    """How many: of 64 by key, of one in total order."""


@dataclass(frozen=True, slots=True)
class WriterLate:
    """A transaction that wrote messages does not end, and ordered delivery waits for it; never a loss."""

    pid: int | None
    """Of its backend, as in pg_stat_activity; None when it is a prepared transaction."""
    age: timedelta
    """Since it began or, where the server does not tell, since it is waited for."""
    passed_over: bool
    """Whether it is waited for no longer: what it commits at last is delivered then, out of order."""


Event = (
    RelayStarted
    | RelayStopped
    | BatchDelivered
    | MessageFailed
    | MessageDied
    | DestinationDown
    | DestinationPartlyDown
    | DestinationUp
    | DatabaseLost
    | RelaysDied
    | RelayFenced
    | RelayStandsBy
    | RelayAtWork
    | SlotsOwned
    | WriterLate
)

Hook = Callable[[Event], None]
"""Receives each event, at once and in the relay's task: it must be quick, and an error it raises is logged."""
