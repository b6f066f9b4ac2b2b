"""What is measured, and how events become measurements, whatever they are handed to."""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Final, Literal, assert_never

import anyio

from outbox._errors import OutboxError, describe
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
from outbox._message import Message
from outbox._outbox import DRIVER_ERRORS, Outbox, Pool
from outbox._pace import after
from outbox._session import Session

_LOGGER: Final = logging.getLogger("outbox")

_COUNT_SECONDS: Final = 10.0
"""How long a count may take at first; each one that takes longer doubles it."""


@dataclass(frozen=True, slots=True, eq=False)  # each is itself only, and its hash quick
class Metric:
    """One thing that is measured.

    A counter only rises. A part is a gauge that each relay has its part of, so that the sum says something. A state is
    a gauge that is the same whoever reads it.
    """

    kind: Literal["counter", "part", "state", "histogram"]
    prometheus: str
    opentelemetry: str
    unit: str
    """As OpenTelemetry writes it."""
    text: str
    bounds: tuple[float, ...] = ()
    """Of a histogram's buckets."""
    by_topic: bool = False
    """Whether it may be told by topic."""


_WORK_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_LAG_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
_SIZES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

DELIVERED: Final = Metric(
    "counter",
    "outbox_delivered_total",
    "messaging.client.sent.messages",
    "{message}",
    "Messages the destination accepted.",
    by_topic=True,
)
FAILED: Final = Metric(
    "counter",
    "outbox_failed_total",
    "outbox.messages.failed",
    "{message}",
    "Deliveries of a message that failed and are tried again.",
    by_topic=True,
)
UNAVAILABLE: Final = Metric(
    "counter",
    "outbox_unavailable_total",
    "outbox.messages.unavailable",
    "{message}",
    "Deliveries of a message for which the destination was unavailable while it took others.",
    by_topic=True,
)
DIED: Final = Metric(
    "counter",
    "outbox_died_total",
    "outbox.messages.died",
    "{message}",
    "Messages given up, which became dead letters.",
    by_topic=True,
)
BATCH_SECONDS: Final = Metric(
    "histogram",
    "outbox_batch_seconds",
    "messaging.client.operation.duration",
    "s",
    "How long the destination took for a batch it accepted, wholly or in part.",
    _WORK_SECONDS,
)
BATCH_MESSAGES: Final = Metric(
    "histogram",
    "outbox_batch_messages",
    "outbox.batch.messages",
    "{message}",
    "How many messages of a batch the destination accepted.",
    _SIZES,
)
LAG: Final = Metric(
    "histogram",
    "outbox_lag_seconds",
    "outbox.lag",
    "s",
    "From the recording of a message to its delivery.",
    _LAG_SECONDS,
)
RELAYS: Final = Metric("part", "outbox_relays", "outbox.relays", "{relay}", "Relays that are running.")
STANDING_BY: Final = Metric(
    "part",
    "outbox_relays_standing_by",
    "outbox.relays.standing_by",
    "{relay}",
    "Relays that wait for those of another order to go.",
)
DESTINATION_DOWN: Final = Metric(
    "part",
    "outbox_destination_down",
    "outbox.destination.down",
    "{relay}",
    "Relays that hold back since their destination is unavailable.",
)
SLOTS: Final = Metric(
    "part", "outbox_slots_owned", "outbox.slots.owned", "{slot}", "Slots owned, where an order is kept."
)
DATABASE_LOST: Final = Metric(
    "counter",
    "outbox_database_lost_total",
    "outbox.database.lost",
    "{error}",
    "Times the database refused or did not answer.",
)
FENCED: Final = Metric(
    "counter",
    "outbox_relays_fenced_total",
    "outbox.relays.fenced",
    "{relay}",
    "Times a relay did not renew its lease in time and lost what it held.",
)
RELAYS_DIED: Final = Metric(
    "counter",
    "outbox_relays_died_total",
    "outbox.relays.died",
    "{relay}",
    "Other relays that were found dead.",
)
WRITERS_LATE: Final = Metric(
    "counter",
    "outbox_writers_late_total",
    "outbox.writers.late",
    "{transaction}",
    "Times ordered delivery was held up by a transaction that does not end.",
)
PENDING: Final = Metric(
    "state",
    "outbox_messages_pending",
    "outbox.messages.pending",
    "{message}",
    "Messages still to be delivered, waiting ones included.",
)
WAITING: Final = Metric(
    "state",
    "outbox_messages_waiting",
    "outbox.messages.waiting",
    "{message}",
    "Messages that are delayed, wait for their next attempt, or stand behind one that does.",
)
OLDEST: Final = Metric(
    "state",
    "outbox_oldest_pending_seconds",
    "outbox.messages.oldest",
    "s",
    "How long the oldest message that is due has waited; 0 when none is due.",
)
DEAD: Final = Metric(
    "state",
    "outbox_dead_letters",
    "outbox.dead_letters",
    "{message}",
    "Dead letters there are.",
)
COUNTED: Final = Metric(
    "state",
    "outbox_counted_timestamp_seconds",
    "outbox.counted",
    "s",
    "When the messages were counted last, in seconds since 1970.",
)

METRICS: Final = (
    DELIVERED,
    FAILED,
    UNAVAILABLE,
    DIED,
    BATCH_SECONDS,
    BATCH_MESSAGES,
    LAG,
    RELAYS,
    STANDING_BY,
    DESTINATION_DOWN,
    SLOTS,
    DATABASE_LOST,
    FENCED,
    RELAYS_DIED,
    WRITERS_LATE,
    PENDING,
    WAITING,
    OLDEST,
    DEAD,
    COUNTED,
)


class Metrics(ABC):
    """A hook that measures one relay, and a task that counts what is in the tables."""

    def __init__(self, outbox: Outbox, *, topics: bool) -> None:
        self._outbox = outbox
        self._table = f"{outbox.schema}.{outbox.table}"
        self._topics = topics
        self._parts: dict[Metric, int] = {}

    @abstractmethod
    def _add(self, metric: Metric, amount: int, topic: str = "") -> None:
        """Adds to a counter or a part."""

    @abstractmethod
    def _observe(self, metric: Metric, values: Iterable[float]) -> None:
        """Puts values into a histogram."""

    @abstractmethod
    def _set(self, metric: Metric, value: float) -> None:
        """Sets a state."""

    def _appear(self) -> None:
        """Lets everything that can be zero be there, as zero: what is absent cannot be watched."""
        for metric in METRICS:
            if metric.kind in {"counter", "part"}:
                self._add(metric, 0)

    def _be(self, metric: Metric, amount: int) -> None:
        """Sets this relay's part; several relays add up."""
        if change := amount - self._parts.get(metric, 0):
            self._parts[metric] = amount
            self._add(metric, change)

    # --- events -----------------------------------------------------------------------------------------

    def __call__(self, event: Event) -> None:
        """Measures what the event tells."""
        match event:
            case BatchDelivered(messages, seconds):
                self._delivered(messages, seconds)
            case MessageFailed(message):
                self._add(FAILED, 1, self._topic(message))
            case MessageDied(message):
                self._add(DIED, 1, self._topic(message))
            case DestinationDown() | DestinationUp() | DestinationPartlyDown():
                self._answered(event)
            case SlotsOwned(slots):
                self._be(SLOTS, slots)
            case DatabaseLost() | RelaysDied() | RelayFenced() | WriterLate():
                self._mishap(event)
            case RelayStarted() | RelayStopped() | RelayStandsBy() | RelayAtWork():
                self._turn(event)
            case _:
                assert_never(event)

    def _answered(self, event: DestinationDown | DestinationUp | DestinationPartlyDown) -> None:
        if isinstance(event, DestinationPartlyDown):
            for topic, count in Counter(map(self._topic, event.messages)).items():
                self._add(UNAVAILABLE, count, topic)
        else:
            self._be(DESTINATION_DOWN, int(isinstance(event, DestinationDown)))

    def _delivered(self, messages: tuple[Message, ...], seconds: float) -> None:
        self._observe(BATCH_SECONDS, [seconds])
        self._observe(BATCH_MESSAGES, [len(messages)])
        # Two clocks, the database's and this host's: a message cannot be delivered before it was recorded.
        now = datetime.now(UTC)
        self._observe(LAG, [max(0.0, (now - (one.recorded_at or now)).total_seconds()) for one in messages])
        topics = Counter(map(self._topic, messages)) if self._topics else {"": len(messages)}
        for topic, count in topics.items():
            self._add(DELIVERED, count, topic)

    def _topic(self, message: Message) -> str:
        return message.topic if self._topics else ""

    def _mishap(self, event: DatabaseLost | RelaysDied | RelayFenced | WriterLate) -> None:
        match event:
            case DatabaseLost():
                self._add(DATABASE_LOST, 1)
            case RelaysDied(relays):
                self._add(RELAYS_DIED, relays)
            case RelayFenced():
                self._be(STANDING_BY, 0)  # it registers anew, and tells if it stands by again
                self._add(FENCED, 1)
            case WriterLate():
                self._add(WRITERS_LATE, 1)
            case _:
                assert_never(event)

    def _turn(self, event: RelayStarted | RelayStopped | RelayStandsBy | RelayAtWork) -> None:
        match event:
            case RelayStarted():
                self._be(RELAYS, 1)
            case RelayStopped():
                for metric in list(self._parts):
                    self._be(metric, 0)
            case RelayStandsBy():
                self._be(STANDING_BY, 1)
            case RelayAtWork():
                self._be(STANDING_BY, 0)
            case _:
                assert_never(event)

    # --- counts -----------------------------------------------------------------------------------------

    async def run(self, pool: Pool, *, interval: timedelta = timedelta(seconds=15)) -> None:
        """Counts the messages in the tables again and again, until it is cancelled or the pool closes.

        One task for each outbox is enough, in any process. A count reads the whole table, so the next one begins after
        the interval or after twenty times as long as this one took, whichever is later: counting takes at most a
        twentieth of one connection's time. When it fails, that is logged, the figures stay what they were, and the
        time of the last count tells their age.

        Args:
            pool: An asyncpg pool; a count takes one of its connections and gives it back. A relay that uses the same
                pool keeps two, so it must have more.
            interval: From one count to the next. The default is as often as a figure usually is collected.

        Raises:
            ValueError: When the interval is not longer than zero.
        """
        if interval <= timedelta():
            raise ValueError(f"interval must be longer than zero, not {interval!r}")
        limit = _COUNT_SECONDS
        while not pool.is_closing():
            started, session = monotonic(), Session(pool, _begin, limit)
            try:
                await self._count(session)
            except (OutboxError, TimeoutError, *DRIVER_ERRORS) as error:
                _LOGGER.warning("the messages of %r were not counted: %s", self._outbox, describe(error))
            limit = session.limit
            await anyio.sleep(after(started, interval.total_seconds()) - monotonic())

    async def _count(self, session: Session) -> None:
        try:
            async with session.transaction() as connection:
                counts = await self._outbox.counts(connection)
        finally:
            await session.close(in_doubt=False)
        self._set(PENDING, counts.pending)
        self._set(WAITING, counts.waiting)
        self._set(OLDEST, counts.oldest.total_seconds() if counts.oldest else 0)
        self._set(DEAD, counts.dead)
        self._set(COUNTED, datetime.now(UTC).timestamp())


def _begin(milliseconds: int) -> str:
    # Not the relay's settings, which pin the walk along an index: a count reads everything.
    return f"BEGIN READ ONLY; SET LOCAL statement_timeout = {milliseconds}"
