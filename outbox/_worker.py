"""One run of a relay: the tasks that claim, deliver, settle and keep the lease, and how they end together."""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import Final, TypeVar

import anyio
from anyio.abc import TaskStatus
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from outbox._backoff import BackOff, ExponentialBackOff, half_jitter
from outbox._breaker import Breaker
from outbox._claims import Batch, Buried, Claims, CommitStrategy, Postponed, Room, Settlement, Suspect
from outbox._delivery import CRASH, Failure, Upcast, decide, decide_crashed, deliver, is_unavailable
from outbox._dispatcher import Dispatcher
from outbox._errors import OutboxError
from outbox._events import (
    BatchDelivered,
    DatabaseLost,
    DestinationDown,
    DestinationUp,
    Event,
    Hook,
    MessageDied,
    MessageFailed,
    RelayFenced,
    RelaysDied,
    RelayStarted,
    RelayStopped,
)
from outbox._holdings import Holdings
from outbox._message import Message
from outbox._outbox import Connection, Outbox, Pool, position_of
from outbox._session import Session, is_transient

_T = TypeVar("_T")
_LOGGER: Final = logging.getLogger("outbox")

_FIRST_POLL: Final = 0.002
"""Seconds before an idle relay looks again for the first time; each further wait is twice as long."""
_FLOOR_INTERVAL: Final = 0.25
"""Seconds between two attempts to raise the floor."""
_START_INTERVAL: Final = 60.0
"""Seconds after which all bounds are forgotten, and claims of nobody looked for: both should never matter."""
_SHARE: Final = 20
"""A search over rows that may be dead takes at most about one part in this many of the time."""
_LOOK_UP: Final = 1.0
"""Seconds after which a relay that has all it can hold looks whether it should stop."""
_SETTLE_SECONDS: Final = 2.0
"""How long the last settling may take when the relay was cancelled rather than stopped."""
_CLEANUP_INTERVAL: Final = 1.0
_CLEANUP_LIMIT: Final = 1_000
"""Messages deleted by one statement of the cleanup."""
_DATABASE_DOWN: Final = ExponentialBackOff(
    initial=timedelta(milliseconds=50), maximum=timedelta(seconds=1), max_tries=-1, jitter=half_jitter
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a relay was made with; `Relay` says what each means."""

    outbox: Outbox
    pool: Pool
    destination: Dispatcher
    batch_size: int
    concurrency: int
    commit: CommitStrategy
    keep: timedelta | None
    backoff: BackOff
    destination_backoff: BackOff
    upcast: Upcast | None
    hooks: Sequence[Hook]
    dispatch_timeout: timedelta
    lease: timedelta
    grace: timedelta
    poll_interval: timedelta
    listen: bool


class Worker:
    """The state of one run; every message it holds is in exactly one place: ready, in delivery, or to be settled."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lease = settings.lease.total_seconds()
        self._grace = settings.grace.total_seconds()
        self._holdings = Holdings(settings.batch_size * settings.concurrency)
        self._claims = Claims(settings.outbox, settings.lease, settings.commit)
        self._breaker = Breaker(settings.destination_backoff)
        # Two connections: however long a search takes, the lease is renewed on the other one.
        begin, limit = settings.outbox._queries.begin, self._lease / 2
        self._searching = Session(settings.pool, begin, limit)
        self._upkeep = Session(settings.pool, begin, limit)
        self._ready: MemoryObjectSendStream[Batch]
        self._to_deliver: MemoryObjectReceiveStream[Batch]
        self._ready, self._to_deliver = anyio.create_memory_object_stream[Batch](float("inf"))
        self._delivered = 0
        self._in_doubt = False
        self._settle_lock = anyio.Lock()
        self._outcomes = Settlement(self._claims.owner)
        self._unsettled: list[Settlement] = []
        self._given_back = 0
        self._lease_ends = 0.0
        self._next_start = self._next_sweep = self._next_due = self._next_floor = self._next_orphans = 0.0
        self._opening = anyio.CancelScope()
        self._stop_by = math.inf
        self._stopping = asyncio.Event()
        self._stopped = asyncio.Event()
        self._wake = asyncio.Event()
        self._space = asyncio.Event()
        self._news = asyncio.Event()
        self._renewed = asyncio.Event()

    # --- the run ----------------------------------------------------------------------------------------

    async def run(self, task_status: TaskStatus[None]) -> None:
        """Works until stop() or cancellation."""
        try:
            with self._opening:
                await self._persistently(self._open)
            if not self._stopping.is_set():
                self._tell(RelayStarted())
                await self._work(task_status)
            else:  # before there was a database: whoever waits for the start need wait no longer
                task_status.started()
        finally:
            try:
                await self._end(self._settling_time())
            finally:
                self._tell(RelayStopped(self._given_back))
                self._stopped.set()

    def _settling_time(self) -> float:
        return min(max(_SETTLE_SECONDS, self._grace / 4), self._stop_by - anyio.current_time())

    async def _work(self, task_status: TaskStatus[None]) -> None:
        async with anyio.create_task_group() as life:
            for task in (self._renewing, self._taking_over, self._settling, self._cleaning, self._listening):
                life.start_soon(task)
            with self._settings.outbox._wakeup.listening(self._wake.set):
                async with anyio.create_task_group() as work:
                    work.start_soon(self._claiming)
                    for _ in range(self._settings.concurrency):
                        work.start_soon(self._delivering)
                    task_status.started()
                    await self._stopping.wait()
                    # Deliveries get the most of the grace period, the rest is for settling what they did.
                    self._stop_by = anyio.current_time() + self._grace
                    work.cancel_scope.deadline = self._stop_by - self._grace / 4
            with anyio.move_on_after(self._grace / 8):  # a settling under way may finish, it is the last but one
                async with self._settle_lock:
                    life.cancel_scope.cancel()
            life.cancel_scope.cancel()

    async def run_once(self) -> int:
        """Delivers the next batch and returns how many messages were delivered."""
        try:
            await self._open()
            async with anyio.create_task_group() as life:
                life.start_soon(self._renewing)
                for batch in await self._claim_once():
                    left: Sequence[Message] = batch.messages
                    if await self._may_dispatch(batch):
                        left = await self._attempt(batch, left)
                    self._give_back(batch, left)
                life.cancel_scope.cancel()
            await self._settle()
            return self._delivered
        finally:
            await self._end(_SETTLE_SECONDS)

    async def stop(self) -> None:
        """Begins to stop, and waits for the end, but no longer than the grace period."""
        self._stopping.set()
        self._opening.cancel()
        for event in (self._wake, self._space, self._renewed):
            event.set()
        self._breaker.end()
        with anyio.move_on_after(self._grace):
            await self._stopped.wait()

    async def _open(self) -> None:
        async with self._upkeep.transaction() as connection:
            await self._settings.outbox.check(connection)
            started = monotonic()
            await self._claims.register(connection)
        self._lease_ends = started + self._lease

    async def _end(self, limit: float) -> None:
        """Settles all that is known, gives back the rest, and leaves; within the limit, answered or not."""
        in_doubt = True
        try:
            with anyio.move_on_after(limit, shield=True) as scope:
                await self._finish()
            in_doubt = scope.cancelled_caught
        finally:
            self._ready.close()
            self._to_deliver.close()
            try:
                await self._searching.close(in_doubt=in_doubt)
            finally:  # a cancellation of asyncio's own passes through every shield
                await self._upkeep.close(in_doubt=in_doubt)

    async def _finish(self) -> None:
        while True:
            try:
                batch = self._to_deliver.receive_nowait()
            except (anyio.WouldBlock, anyio.EndOfStream):
                break
            self._give_back(batch, batch.messages)
        await self._persistently(self._settle)
        if self._lease_ends:  # otherwise it never came to register
            await self._persistently(self._leave)

    async def _leave(self) -> None:
        async with self._upkeep.transaction() as connection:
            await self._claims.leave(connection)

    async def _persistently(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Does database work, again and again for as long as the database is away."""
        failures = 0
        while True:
            try:
                return await work()
            except Exception as error:
                if not is_transient(error) or self._settings.pool.is_closing():
                    raise
                failures += 1
                # Whatever is known of the table is known no more: a server that crashed may have forgotten a settling.
                self._next_start = 0.0
                self._in_doubt = True
                delay = _DATABASE_DOWN(failures, error)
                assert delay is not None
                self._tell(DatabaseLost(error, delay))
                with anyio.move_on_after(delay.total_seconds()):
                    # A relay that begins to stop waits no longer; one that is stopping has to settle, and does.
                    await (self._stopping.wait() if not self._stopping.is_set() else anyio.sleep_forever())

    # --- claiming ---------------------------------------------------------------------------------------

    async def _claiming(self) -> None:
        idle = _FIRST_POLL
        with self._ready:
            while not self._stopping.is_set():
                if self._settings.pool.is_closing():  # which waits for the connections that are kept here
                    self._stopping.set()
                    break
                if self._holdings.is_half_full:
                    self._space.clear()
                    with anyio.move_on_after(_LOOK_UP):
                        await self._space.wait()
                    continue
                self._wake.clear()
                batches = await self._persistently(self._claim)
                for batch in batches:
                    self._ready.send_nowait(batch)
                if batches:
                    idle = _FIRST_POLL
                    continue
                with anyio.move_on_after(idle):
                    await self._wake.wait()
                idle = min(idle * 2, self._settings.poll_interval.total_seconds())

    async def _claim(self) -> list[Batch]:
        """Claims what there is room for, in one short transaction; only its COMMIT makes it ours."""
        if self._stopping.is_set():
            return []
        if self._unsettled:  # run again after a new claim of the same message, it would let go of that one
            await self._settle()
        claims, size, started = self._claims, self._settings.batch_size, monotonic()
        sweep, look_for_due = started >= self._next_sweep, started >= self._next_due
        async with self._doubting() as connection:
            if started >= self._next_start:
                await claims.find_start(connection)
                self._next_start = self._after(started, _START_INTERVAL)
            if started >= self._next_floor and claims.is_behind:
                await claims.raise_floor(connection)
                self._next_floor = self._after(started, _FLOOR_INTERVAL)
            batches = await claims.claim_fresh(connection, self._holdings.room(), size, sweep=sweep)
            if sweep:
                self._next_sweep = self._after(started, 0.0)
            if look_for_due:
                started = monotonic()
                due, more = await self._claim_due(connection, self._holdings.room_for_waiting())
                self._next_due = 0.0 if more else self._after(started, self._settings.poll_interval.total_seconds())
                batches += due
        self._holdings.add(batches)
        return batches

    async def _claim_once(self) -> list[Batch]:
        """Claims one batch: of fresh messages, else of those that are due, else one suspect of a crash."""
        size = self._settings.batch_size
        async with self._upkeep.transaction() as connection:
            await self._claims.take_over(connection, orphans=True)
        async with self._doubting() as connection:
            room = Room(size, self._holdings.room().bytes)
            batches = await self._claims.claim_fresh(connection, room, size, sweep=True)
            if not batches:
                batches, _ = await self._claim_due(connection, room)
        self._holdings.add(batches)
        return batches

    async def _claim_due(self, connection: Connection, room: Room) -> tuple[list[Batch], bool]:
        batches, more = await self._claims.claim_due(connection, room)
        # One suspect of a crash at a time: if it kills this process too, it must be clear which one it was.
        if not self._holdings.holds_crash_suspect and (suspect := await self._claims.claim_crash_suspect(connection)):
            batches.append(suspect)
        return batches, more

    @asynccontextmanager
    async def _doubting(self) -> AsyncIterator[Connection]:
        """A transaction for claiming, which first lets go of what the last one, its outcome unknown, may have left."""
        async with self._searching.transaction() as connection:
            if self._in_doubt:
                await self._claims.reconcile(connection, self._holdings.claims, self._holdings.waiting)
            self._in_doubt = True
            yield connection
        self._in_doubt = False

    @staticmethod
    def _after(started: float, interval: float) -> float:
        now = monotonic()
        return now + max(interval, _SHARE * (now - started))

    # --- delivering -------------------------------------------------------------------------------------

    async def _delivering(self) -> None:
        async for batch in self._to_deliver:
            left: Sequence[Message] = batch.messages
            try:
                while left and await self._may_dispatch(batch):
                    left = await self._attempt(batch, left)
                    # A destination that answers without ever waiting must not keep the loop to itself.
                    await asyncio.sleep(0)
            finally:
                # The relay is stopping, the delivery was cancelled, or the batch is no longer this relay's.
                self._give_back(batch, left)

    async def _may_dispatch(self, batch: Batch) -> bool:
        """Waits for the lease and for the destination; False when the relay is stopping or lost the batch."""
        while not self._stopping.is_set() and batch.owner == self._claims.owner:
            if monotonic() >= self._lease_ends:
                self._renewed.clear()
                await self._renewed.wait()
            elif not await self._breaker.admit():
                return False
            elif monotonic() < self._lease_ends and batch.owner == self._claims.owner:
                return True
            else:  # it was lost while it waited for the destination
                self._breaker.released()
        return False

    async def _attempt(self, batch: Batch, messages: Sequence[Message]) -> Sequence[Message]:
        """Dispatches once, notes what became of the messages, and returns those to be tried again by this relay."""
        settings, started = self._settings, monotonic()
        if batch.suspect is Suspect.CRASH and (buried := decide_crashed(messages[0], settings.backoff)):
            self._breaker.released()
            self._note_failures(batch, [(messages[0], OutboxError(CRASH), buried)])
            return ()
        try:
            failures = await deliver(settings.destination, messages, settings.upcast, settings.dispatch_timeout)
        except BaseException:
            self._breaker.released()
            raise
        accepted = [one for one in messages if position_of(one) not in failures] if failures else messages
        if accepted:
            self._delivered += len(accepted)
            self._outcomes_of(batch).delivers(batch, accepted)
            if settings.hooks:
                self._tell(BatchDelivered(tuple(accepted), monotonic() - started))
        unavailable = self._sort_failures(batch, messages, failures) if failures else []
        if unavailable:
            error = failures[position_of(unavailable[0])].error
            self._tell(DestinationDown(error, self._breaker.failed(error)))
        elif self._breaker.succeeded():
            self._tell(DestinationUp())
        self._news.set()
        return unavailable

    def _sort_failures(
        self, batch: Batch, messages: Sequence[Message], failures: Mapping[int, Failure]
    ) -> list[Message]:
        """Notes what became of those that failed, and returns those for which the destination was just down."""
        unavailable = []
        outcomes = []
        for message in messages:
            failure = failures.get(position_of(message))
            if failure is None:
                continue
            if is_unavailable(failure):
                unavailable.append(message)
            else:
                outcomes.append((message, failure.error, decide(batch, message, failure, self._settings.backoff)))
        self._note_failures(batch, outcomes)
        return unavailable

    def _note_failures(
        self, batch: Batch, outcomes: Sequence[tuple[Message, BaseException, Postponed | Buried]]
    ) -> None:
        self._outcomes_of(batch).fails(batch, [outcome for _, _, outcome in outcomes])
        for message, error, outcome in outcomes:
            if isinstance(outcome, Buried):
                self._tell(MessageDied(message, error, outcome.attempts))
            else:
                self._tell(MessageFailed(message, error, outcome.attempts, outcome.delay))
        self._news.set()

    def _give_back(self, batch: Batch, messages: Sequence[Message]) -> None:
        """Makes messages due at once for any relay; without an attempt spent, since none was answered."""
        spent = 1 if batch.suspect is Suspect.CRASH else 0
        if messages:
            self._given_back += len(messages)
            back = [Postponed(position_of(one), timedelta(), one.attempts - spent, batch.suspect) for one in messages]
            self._outcomes_of(batch).fails(batch, back)
            self._news.set()

    def _outcomes_of(self, batch: Batch) -> Settlement:
        if self._outcomes.owner != batch.owner:  # claimed before, or after, this relay was taken for dead
            self._unsettled.append(self._outcomes)
            self._outcomes = Settlement(batch.owner)
        return self._outcomes

    # --- settling ---------------------------------------------------------------------------------------

    async def _settling(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            await self._persistently(self._settle)

    async def _settle(self) -> None:
        """Settles all that is known by now in one transaction; what cannot be settled stays to be settled."""
        if self._outcomes.messages:
            self._unsettled.append(self._outcomes)
            self._outcomes = Settlement(self._outcomes.owner)
        async with self._settle_lock:
            while self._unsettled:
                settlement = self._unsettled[0]
                async with self._searching.transaction() as connection:
                    await self._claims.settle(connection, settlement)
                del self._unsettled[0]
                self._forget(settlement)

    def _forget(self, settlement: Settlement) -> None:
        self._holdings.remove(settlement)
        self._space.set()
        if settlement.crash_suspects:
            self._next_due = 0.0
        if settlement.delivered_waiting or settlement.postponed or settlement.buried:
            self._wake.set()  # there is room for more of those that are due

    # --- keeping the lease, and the house -----------------------------------------------------------------

    async def _renewing(self) -> None:
        while True:
            await anyio.sleep(self._lease / 3)
            await self._persistently(self._renew)

    async def _renew(self) -> None:
        async with self._upkeep.transaction() as connection:
            started = monotonic()
            alive = await self._claims.renew(connection)
            if not alive:
                self._claims.rename()
                await self._claims.register(connection)
        if not alive:
            self._tell(RelayFenced())
        self._lease_ends = started + self._lease
        self._renewed.set()

    async def _taking_over(self) -> None:
        while True:
            relays, messages = await self._persistently(self._take_over)
            if relays:
                self._tell(RelaysDied(relays, messages))
                self._next_due = 0.0
            await anyio.sleep(self._lease / 3)

    async def _take_over(self) -> tuple[int, int]:
        started = monotonic()
        orphans = started >= self._next_orphans
        async with self._upkeep.transaction() as connection:
            taken = await self._claims.take_over(connection, orphans=orphans)
        if orphans:
            self._next_orphans = self._after(started, _START_INTERVAL)
        return taken

    async def _cleaning(self) -> None:
        keep = self._settings.keep
        while keep is not None:
            started = monotonic()
            if await self._persistently(self._clean) < _CLEANUP_LIMIT:
                await anyio.sleep(self._after(started, _CLEANUP_INTERVAL) - monotonic())

    async def _clean(self) -> int:
        assert self._settings.keep is not None
        async with self._upkeep.transaction() as connection:
            return await self._settings.outbox.cleanup(connection, self._settings.keep, _CLEANUP_LIMIT)

    async def _listening(self) -> None:
        if self._settings.listen:
            while True:
                await self._persistently(self._listen)

    async def _listen(self) -> None:
        """Wakes the relay by NOTIFY for as long as the connection lives."""
        channel, lost = self._settings.outbox._queries.channel, asyncio.Event()
        async with self._settings.pool.acquire(timeout=self._lease) as connection:
            try:
                connection.add_termination_listener(lambda _: lost.set())
                with anyio.fail_after(self._lease / 2):
                    await connection.add_listener(channel, self._woken)
                self._wake.set()  # what was notified before is not repeated
                await lost.wait()
            finally:
                if not connection.is_closed():
                    connection.terminate()
        raise ConnectionResetError("the connection that listens was lost")

    def _woken(self, *_: object) -> None:
        self._wake.set()

    # --- telling ----------------------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        _log(event)
        for hook in self._settings.hooks:
            try:
                hook(event)
            except Exception:
                _LOGGER.exception("a hook failed on %s", type(event).__name__)


def _log(event: Event) -> None:
    match event:
        case MessageDied():
            _LOGGER.error("%r is a dead letter after %d attempts: %r", event.message, event.attempts, event.error)
        case MessageFailed():
            _LOGGER.warning("%r failed, next try in %s: %r", event.message, event.delay, event.error)
        case DestinationDown():
            _LOGGER.warning("the destination is unavailable, next try in %s: %r", event.delay, event.error)
        case DatabaseLost():
            _LOGGER.warning("the database is away, next try in %s: %r", event.delay, event.error)
        case RelaysDied():
            _LOGGER.warning("%d relay(s) died holding %d message(s), now tried again", event.relays, event.messages)
        case RelayFenced():
            _LOGGER.warning("this relay did not renew its lease in time and lost what it held")
        case _:
            pass
