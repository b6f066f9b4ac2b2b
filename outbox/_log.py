"""What an event says in the log: a level, a text and fields; never a payload, never headers."""

import logging
from datetime import timedelta
from typing import Final, NamedTuple, assert_never

from outbox._errors import describe
from outbox._events import (
    BatchDelivered,
    DatabaseLost,
    DestinationDown,
    DestinationPartlyDown,
    DestinationUp,
    Event,
    MessageDied,
    MessageFailed,
    RelayAtWork,
    RelayFenced,
    RelaysDied,
    RelayStandsBy,
    RelayStarted,
    RelayStopped,
    SlotsOwned,
    WriterLate,
)

_LOGGER: Final = logging.getLogger("outbox")


class Entry(NamedTuple):
    """What is logged of an event."""

    level: int
    text: str
    arguments: tuple[object, ...]
    """Of the text."""
    fields: dict[str, object]
    """By name; no name is one that a record, or a formatter of structlog, has a use of its own for."""


def log(event: Event, table: str) -> None:
    """Logs an event of a relay that works on this table."""
    entry = entry_of(event)
    if entry and _LOGGER.isEnabledFor(entry.level):
        fields = {"outbox": table, "outbox_event": type(event).__name__, **entry.fields}
        _LOGGER.log(entry.level, entry.text, *entry.arguments, extra=fields)


def entry_of(event: Event) -> Entry | None:
    """Returns what is logged of an event; None is nothing."""
    match event:
        case BatchDelivered():  # each batch has one
            return None
        case MessageFailed() | MessageDied():
            return _of_message(event)
        case DestinationDown() | DestinationPartlyDown() | DestinationUp() | DatabaseLost():
            return _of_the_others(event)
        case SlotsOwned() | WriterLate() | RelayStandsBy() | RelayAtWork():
            return _of_order(event)
        case RelayStarted() | RelayStopped() | RelaysDied() | RelayFenced():
            return _of_relay(event)
        case _:
            assert_never(event)


def _of_message(event: MessageFailed | MessageDied) -> Entry:
    message = event.message
    fields: dict[str, object] = {
        "message_id": str(message.id),
        "topic": message.topic,
        "key": message.key,
        "position": message.position,
        "attempts": event.attempts,
        **_error(event.error),
    }
    if isinstance(event, MessageDied):
        text = "%r is a dead letter after %d attempt(s): %s"
        return Entry(logging.ERROR, text, (message, event.attempts, fields["error"]), fields)
    text = "%r failed, next try in %s: %s"
    return Entry(logging.WARNING, text, (message, event.delay, fields["error"]), fields | _delay(event.delay))


def _of_the_others(event: DestinationDown | DestinationPartlyDown | DestinationUp | DatabaseLost) -> Entry:
    if isinstance(event, DestinationUp):
        return Entry(logging.INFO, "the destination accepts again", (), {})
    fields = {**_error(event.error), **_delay(event.delay)}
    if isinstance(event, DestinationPartlyDown):
        count, topics = len(event.messages), sorted({message.topic for message in event.messages})
        text = "the destination is unavailable for %d message(s) of %s, while it takes others, next try in %s: %s"
        arguments = count, ", ".join(map(repr, topics)), event.delay, fields["error"]
        return Entry(logging.WARNING, text, arguments, fields | {"messages": count, "topics": topics})
    who = "the destination is unavailable" if isinstance(event, DestinationDown) else "the database is away"
    return Entry(logging.WARNING, f"{who}, next try in %s: %s", (event.delay, fields["error"]), fields)


def _of_relay(event: RelayStarted | RelayStopped | RelaysDied | RelayFenced) -> Entry:
    match event:
        case RelayStarted():
            return Entry(logging.INFO, "the relay has started", (), {})
        case RelayStopped(given_back):
            text = "the relay has stopped and gave back %d message(s)"
            return Entry(logging.INFO, text, (given_back,), {"given_back": given_back})
        case RelaysDied(relays, messages):
            text = "%d relay(s) died holding %d message(s), now tried again"
            return Entry(logging.WARNING, text, (relays, messages), {"relays": relays, "messages": messages})
        case RelayFenced():
            text = "this relay did not renew its lease in time and lost what it held"
            return Entry(logging.WARNING, text, (), {})
        case _:
            assert_never(event)


def _of_order(event: SlotsOwned | WriterLate | RelayStandsBy | RelayAtWork) -> Entry:
    match event:
        case SlotsOwned(slots):
            return Entry(logging.DEBUG, "this relay owns %d slot(s)", (slots,), {"slots": slots})
        case RelayStandsBy(order):
            text = "this relay stands by: others with another order than %r are at work"
            return Entry(logging.WARNING, text, (order,), {"order": order})
        case RelayAtWork():
            return Entry(logging.INFO, "this relay stood by and is at work now", (), {})
        case WriterLate(pid, age, passed_over):
            text = "ordered delivery waits for a transaction of pid %s, open for %s"
            if passed_over:
                text = f"{text.replace('waits', 'no longer waits')}: what it commits comes out of order"
            age_seconds = age.total_seconds()
            fields: dict[str, object] = {"pid": pid, "age_seconds": age_seconds, "passed_over": passed_over}
            return Entry(logging.WARNING, text, (pid, age), fields)
        case _:
            assert_never(event)


def _error(error: BaseException) -> dict[str, object]:
    return {"error": describe(error), "error_type": type(error).__qualname__}


def _delay(delay: timedelta) -> dict[str, object]:
    return {"delay_seconds": delay.total_seconds()}
