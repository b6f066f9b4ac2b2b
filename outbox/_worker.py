"""One run of a relay: the tasks that claim, deliver, settle and keep the lease, and how they end together."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import Final, NamedTuple, Protocol, TypeVar

import anyio
import asyncpg

from outbox._backoff import BackOff, ExponentialBackOff, half_jitter
from outbox._breaker import Breaker, Refusal
from outbox._claims import Batch, Buried, CommitStrategy, Postponed, Settlement, Suspect
from outbox._competing import Competing
from outbox._delivery import CRASH, Failure, Upcast, decide, decide_crashed, deliver, is_unavailable, wait
from outbox._dispatcher import Dispatcher
from outbox._errors import OutboxError
from outbox._events import (
    BatchDelivered,
    DatabaseLost,
    DestinationDown,
    DestinationPartlyDown,
    DestinationUp,
    Event,
    Hook,
    MessageDied,
    MessageFailed,
    RelayAtWork,
    RelayFenced,
    RelaysDied,
    RelayStandsBy,
    RelayStarted,
    RelayStopped,
)
from outbox._log import log
from outbox._membership import Membership, TakenOver
from outbox._message import Message
from outbox._outbox import Connection, Outbox, Pool, position_of
from outbox._owning import OnFailure, Owning
from outbox._pace import START_INTERVAL, after
from outbox._queries import Ordering
from outbox._session import READY_SECONDS, Session, is_transient

_T = TypeVar("_T")
_LOGGER: Final = logging.getLogger("outbox")

_FIRST_POLL: Final = 0.002
"""Seconds before an idle relay looks again for the first time; each further wait is twice as long."""
_GATHERING: Final = 0.0005
_LONGEST_GATHERING: Final = 0.02
"""Seconds after a claim of several messages, but less than a batch: the first of these for each but one. More are on
their way, and to claim them one by one would cost their writers a tenth of their speed."""
_SETTLE_INTERVAL: Final = 0.02
"""Seconds for which what was delivered is gathered to be settled, while there is not much of it."""
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
    order: Ordering
    on_failure: OnFailure
    late_commit_wait: timedelta


class Hands(Protocol):
    """What a relay has in its hands, and how it comes by more; the worker says when, and whose connection it is.

    What is done with a connection counts only after the COMMIT, and is taken note of then by a call of its own.
    """

    @property
    def is_half_full(self) -> bool: ...
    @property
    def must_settle(self) -> bool: ...
    @property
    def settles_beside(self) -> bool: ...
    def doubt(self) -> None: ...
    def look(self) -> None: ...
    def balance_is_due(self) -> bool: ...
    async def balance(self, connection: Connection) -> bool: ...
    def balanced(self) -> None: ...
    async def claim(self, connection: Connection) -> None: ...
    def go_ahead(self) -> bool: ...
    def withdraw(self) -> None: ...
    async def claim_one(self, connection: Connection) -> None: ...
    def claimed(self) -> int: ...
    def take(self) -> Batch | None: ...
    def is_mine(self, batch: Batch) -> bool: ...
    def delivered(self, batch: Batch, messages: Sequence[Message]) -> None: ...
    def failed(self, batch: Batch, outcomes: Sequence[Postponed | Buried]) -> None: ...
    def put_back(self, batch: Batch) -> bool: ...
    def done(self, batch: Batch, left: Sequence[Message]) -> None: ...
    def to_settle(self) -> Settlement | None: ...
    async def settle(self, connection: Connection, settlement: Settlement) -> None: ...
    def settled(self, settlement: Settlement) -> bool: ...
    async def oldest(self, connection: Connection) -> timedelta | None: ...
    async def renew(self, connection: Connection) -> bool: ...
    async def leave(self, connection: Connection) -> None: ...


class _Refused(NamedTuple):
    """For what the destination was away."""

    messages: Sequence[Message]
    behind: Collection[int]
    """Lanes in which they stay behind one that failed otherwise."""
    error: BaseException
    refusal: Refusal


class Worker:
    """The state of one run."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._table = f"{settings.outbox.schema}.{settings.outbox.table}"
        self._lease = settings.lease.total_seconds()
        self._grace = settings.grace.total_seconds()
        self._membership = Membership(settings.outbox, settings.lease, settings.order)
        self._hands = self._make_hands()
        self._breaker = Breaker(settings.destination_backoff)
        # Two connections: however long a search takes, the lease is renewed on the other one.
        begin, limit = settings.outbox._queries.begin, self._lease / 2
        self._searching = Session(settings.pool, begin, limit)
        self._upkeep = Session(settings.pool, begin, limit)
        self._delivered = 0
        self._settle_lock = anyio.Lock()
        self._has_many = self._is_restless = False
        self._given_back = 0
        # For its health: when the calls of the destination under way began, and when the lease was last seen to.
        self._calls: list[float] = []
        self._moved = math.inf
        self._lease_ends = 0.0
        self._next_orphans = 0.0
        self._opening = anyio.CancelScope()
        self._stop_by = math.inf
        self._stopping = asyncio.Event()
        self._stopped = asyncio.Event()
        self._wake = asyncio.Event()
        self._space = asyncio.Event()
        self._news = asyncio.Event()
        self._renewed = asyncio.Event()
        self._ready = asyncio.Event()
        self._committed = asyncio.Event()
        self._committed.set()

    def _make_hands(self) -> Hands:
        settings = self._settings
        if settings.order == "none":
            return Competing(
                settings.outbox,
                self._membership,
                batch_size=settings.batch_size,
                concurrency=settings.concurrency,
                commit=settings.commit,
                poll_interval=settings.poll_interval,
            )
        return Owning(
            settings.outbox,
            self._membership,
            ordering=settings.order,
            on_failure=settings.on_failure,
            patience=settings.late_commit_wait,
            batch_size=settings.batch_size,
            concurrency=settings.concurrency,
            commit=settings.commit,
            lease=settings.lease,
            poll_interval=settings.poll_interval,
            tell=self._tell,
        )

    # --- the run ----------------------------------------------------------------------------------------

    async def run(self, is_ready: Callable[[], None]) -> None:
        """Works until stop() or cancellation, and tells once when it has begun."""
        try:
            with self._opening:
                await self._persistently(self._open)
            if not self._stopping.is_set():
                self._tell(RelayStarted())
                await self._work(is_ready)
            else:  # before there was a database: whoever waits for the start need wait no longer
                is_ready()
        finally:
            try:
                await self._end(self._settling_time())
            finally:
                self._tell(RelayStopped(self._given_back))
                self._stopped.set()

    def _settling_time(self) -> float:
        return min(max(_SETTLE_SECONDS, self._grace / 4), self._stop_by - anyio.current_time())

    async def _work(self, is_ready: Callable[[], None]) -> None:
        async with anyio.create_task_group() as life:
            for task in (self._renewing, self._taking_over, self._settling, self._cleaning, self._listening):
                life.start_soon(task)
            with self._settings.outbox._wakeup.listening(self._wake.set):
                async with anyio.create_task_group() as work:
                    work.start_soon(self._claiming)
                    for _ in range(self._settings.concurrency):
                        work.start_soon(self._delivering)
                    is_ready()
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
                await self._claim_once()
                while batch := self._hands.take():
                    left: Sequence[Message] = batch.messages
                    if await self._may_dispatch(batch):
                        refused = await self._attempt(batch)
                        left = refused.messages if refused else ()
                    self._take_back(batch, left)
                life.cancel_scope.cancel()
            await self._settle()
            return self._delivered
        finally:
            await self._end(_SETTLE_SECONDS)

    async def stop(self) -> None:
        """Begins to stop, and waits for the end, but no longer than the grace period."""
        self._stopping.set()
        self._opening.cancel()
        for event in (self._wake, self._space, self._renewed, self._ready):
            event.set()
        self._breaker.end()
        with anyio.move_on_after(self._grace):
            await self._stopped.wait()

    async def _open(self) -> None:
        async with self._upkeep.transaction() as connection:
            await self._settings.outbox.check(connection)
            started = monotonic()
            await self._membership.register(connection)
        self._lease_ends = started + self._lease
        self._say_whether_active()

    def _say_whether_active(self) -> None:
        if not self._membership.is_active:
            self._tell(RelayStandsBy(self._settings.order))

    async def _end(self, limit: float) -> None:
        """Settles all that is known, gives back the rest, and leaves; within the limit, answered or not."""
        in_doubt = True
        try:
            with anyio.move_on_after(limit, shield=True) as scope:
                await self._finish()
            in_doubt = scope.cancelled_caught
        finally:
            try:
                await self._searching.close(in_doubt=in_doubt)
            finally:  # a cancellation of asyncio's own passes through every shield
                await self._upkeep.close(in_doubt=in_doubt)

    async def _finish(self) -> None:
        while batch := self._hands.take():
            self._take_back(batch, batch.messages)
        await self._persistently(self._settle)
        await self._persistently(self._searching.rest)
        if self._lease_ends:  # otherwise it never came to register
            await self._persistently(self._leave)

    async def _leave(self) -> None:
        async with self._upkeep.transaction() as connection:
            await self._hands.leave(connection)

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
                self._hands.doubt()
                delay = _DATABASE_DOWN(failures, error)
                assert delay is not None
                self._tell(DatabaseLost(error, delay))
                with anyio.move_on_after(delay.total_seconds()):
                    # A relay that begins to stop waits no longer; one that is stopping has to settle, and does.
                    await (self._stopping.wait() if not self._stopping.is_set() else anyio.sleep_forever())

    # --- claiming ---------------------------------------------------------------------------------------

    async def _claiming(self) -> None:
        idle = _FIRST_POLL
        while not self._stopping.is_set():
            if self._settings.pool.is_closing():  # which waits for the connections that are kept here
                self._stopping.set()
                break
            if self._hands.balance_is_due():
                await self._persistently(self._balance)
            if self._hands.is_half_full:
                self._space.clear()
                await self._pause(self._space, _LOOK_UP)
                continue
            self._wake.clear()
            self._is_restless = idle <= READY_SECONDS
            if claimed := await self._persistently(self._claim):
                self._ready.set()
                idle = _FIRST_POLL
            self._has_many = claimed >= self._settings.batch_size or self._hands.is_half_full
            if self._has_many:
                continue
            if claimed > 1:
                with anyio.move_on_after(min((claimed - 1) * _GATHERING, _LONGEST_GATHERING)):
                    await self._stopping.wait()
            with self._settings.outbox._wakeup.asleep():
                await self._pause(self._wake, idle)
            idle = min(idle * 2, self._settings.poll_interval.total_seconds())
        self._ready.set()

    async def _pause(self, event: asyncio.Event, seconds: float) -> None:
        """Waits for the event, but no longer than this, and not for long with a transaction open for the next claim."""
        with anyio.move_on_after(min(seconds, READY_SECONDS)):
            await event.wait()
            return
        if seconds > READY_SECONDS:
            await self._persistently(self._searching.rest)
            with anyio.move_on_after(seconds - READY_SECONDS):
                await event.wait()

    async def _claim(self) -> int:
        """Claims what there is room for, in one short transaction; returns how many messages that were."""
        if self._stopping.is_set() or not self._membership.is_active:
            return 0
        if self._hands.settles_beside:
            return await self._claim_now()
        async with self._settle_lock:
            if self._hands.must_settle:
                await self._settle_all()
            return await self._claim_now()

    async def _claim_now(self) -> int:
        try:
            async with self._searching.transaction(to_go_on=self._is_restless, on_commit=self._go_ahead) as connection:
                await self._hands.claim(connection)
            return self._hands.claimed()
        except BaseException:
            self._hands.withdraw()
            raise
        finally:
            self._committed.set()

    def _go_ahead(self) -> None:
        """Has what is claimed delivered while its COMMIT is under way, which saves a round trip of its latency.

        Until the COMMIT others find it locked, and then claimed. One that fails is as one that the server forgets when
        it crashes: what was delivered by then may be delivered again.
        """
        if self._hands.go_ahead():
            self._committed.clear()
            self._ready.set()

    async def _balance(self) -> None:
        """Looks at who owns what, while nothing is settled: that asks whether all is owned that was when it began."""
        async with self._settle_lock, self._searching.transaction() as connection:
            has_changed = await self._hands.balance(connection)
        if has_changed:
            self._hands.balanced()

    async def _claim_once(self) -> None:
        """Claims one batch."""
        await self._look_after_the_dead(orphans=True)
        if self._membership.is_active:
            await self._balance()
            async with self._searching.transaction() as connection:
                await self._hands.claim_one(connection)
            self._hands.claimed()

    # --- delivering -------------------------------------------------------------------------------------

    async def _delivering(self) -> None:
        while not self._stopping.is_set():
            batch = self._hands.take()
            if batch is None:
                self._ready.clear()
                await self._ready.wait()
                continue
            left: Sequence[Message] = batch.messages
            try:
                if await self._may_dispatch(batch):
                    refused = await self._attempt(batch)
                    left = ()
                    if refused:
                        self._hold_back(batch, refused)
                    # A destination that answers without ever waiting must not keep the loop to itself.
                    await asyncio.sleep(0)
            finally:
                # The relay is stopping, the delivery was cancelled, or the batch is no longer this relay's.
                self._take_back(batch, left)

    async def _may_dispatch(self, batch: Batch) -> bool:
        """Waits for the lease and for the destination; False when the relay is stopping or lost the batch."""
        while not self._stopping.is_set() and self._hands.is_mine(batch):
            if monotonic() >= self._lease_ends:
                self._renewed.clear()
                await self._renewed.wait()
            elif not await self._breaker.admit():
                return False
            elif monotonic() < self._lease_ends and self._hands.is_mine(batch):
                return True
            else:  # it was lost while it waited for the destination
                self._breaker.released()
        return False

    async def _attempt(self, batch: Batch) -> _Refused | None:
        """Dispatches once, notes what became of the messages, and returns those for which the destination was away."""
        settings, messages, started = self._settings, batch.messages, monotonic()
        if batch.suspect is Suspect.CRASH and (buried := decide_crashed(messages[0], settings.backoff)):
            self._breaker.released()
            self._note_failures(batch, [(messages[0], OutboxError(CRASH), buried)])
            return None
        try:
            self._calls.append(started)
            failures = await deliver(
                settings.destination,
                messages,
                settings.upcast,
                settings.dispatch_timeout,
                in_order=settings.on_failure != "skip",
            )
        except BaseException:
            self._breaker.released()
            raise
        finally:
            self._calls.remove(started)
        accepted = [one for one in messages if position_of(one) not in failures] if failures else messages
        if accepted:
            self._delivered += len(accepted)
            self._hands.delivered(batch, accepted)
            if settings.hooks:
                self._tell(BatchDelivered(tuple(accepted), monotonic() - started))
        unavailable, behind = self._sort_failures(batch, failures) if failures else ((), ())
        if (accepted or not unavailable) and self._breaker.accepted():
            self._tell(DestinationUp())
        return self._refused(unavailable, behind, failures, in_part=bool(accepted)) if unavailable else None

    def _sort_failures(
        self, batch: Batch, failures: Mapping[int, Failure]
    ) -> tuple[Sequence[Message], Collection[int]]:
        """Notes what became of those that failed.

        Returns those for which the destination was just away, and the lanes in which they stay behind one that failed.
        """
        unavailable = []
        outcomes = []
        waiting: set[int | None] = set()
        for message in batch.messages:
            failure = failures.get(position_of(message))
            if failure is None:
                continue
            # What failed behind one that spends no attempt spends none as well.
            if is_unavailable(failure) or message._lane in waiting:
                unavailable.append(message)
                waiting |= {message._lane} - {None}
            else:
                outcomes.append((message, failure.error, decide(batch, message, failure, self._settings.backoff)))
        self._note_failures(batch, outcomes)
        if self._settings.on_failure == "skip":
            return unavailable, ()
        return unavailable, {message._lane for message, _, _ in outcomes if message._lane is not None}

    def _refused(
        self,
        messages: Sequence[Message],
        behind: Collection[int],
        failures: Mapping[int, Failure],
        *,
        in_part: bool,
    ) -> _Refused:
        error = failures[position_of(messages[0])].error
        refusal = self._breaker.refused(error, in_part=in_part)
        if refusal.for_all:
            self._tell(DestinationDown(error, refusal.delay))
        else:
            self._tell(DestinationPartlyDown(tuple(messages), error, refusal.delay))
        return _Refused(messages, behind, error, refusal)

    def _hold_back(self, batch: Batch, refused: _Refused) -> None:
        """Has those wait for which the destination was away: no attempt is spent.

        In hand if it was away for all, and others are tried first; in the table if it takes others meanwhile. So wait
        those, too, that have to stay behind one that failed in the same call.
        """
        for_all, delay = refused.refusal
        in_hand = [one for one in refused.messages if for_all and one._lane not in refused.behind]
        if in_hand and self._hands.put_back(batch._replace(messages=in_hand)):
            in_the_table = [one for one in refused.messages if one._lane in refused.behind]
        else:
            in_the_table = list(refused.messages)
        self._hands.failed(batch, [wait(batch, one, delay, refused.error) for one in in_the_table])

    def _note_failures(
        self, batch: Batch, outcomes: Sequence[tuple[Message, BaseException, Postponed | Buried]]
    ) -> None:
        self._hands.failed(batch, [outcome for _, _, outcome in outcomes])
        for message, error, outcome in outcomes:
            if isinstance(outcome, Buried):
                self._tell(MessageDied(message, error, outcome.attempts))
            else:
                self._tell(MessageFailed(message, error, outcome.attempts, outcome.delay or timedelta()))

    def _take_back(self, batch: Batch, left: Sequence[Message]) -> None:
        self._given_back += len(left)
        self._hands.done(batch, left)
        self._ready.set()
        self._space.set()
        self._news.set()

    # --- settling ---------------------------------------------------------------------------------------

    async def _settling(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            with anyio.move_on_after(_SETTLE_INTERVAL):
                while not self._has_many and self._hands.settles_beside:
                    await self._news.wait()  # more is on its way, and nobody waits for it to be settled
                    self._news.clear()
            await self._persistently(self._settle)

    async def _settle(self) -> None:
        """Settles all that is known by now in one transaction; what cannot be settled stays to be settled."""
        async with self._settle_lock:
            await self._settle_all()

    async def _settle_all(self) -> None:
        while True:
            await self._committed.wait()  # what goes ahead is settled when the table says whose it is
            settlement = self._hands.to_settle()
            if settlement is None:
                break
            if not (self._hands.settles_beside and await self._settle_beside(settlement)):
                async with self._searching.transaction() as connection:
                    await self._hands.settle(connection, settlement)
            if self._hands.settled(settlement):
                self._wake.set()
            self._space.set()

    async def _settle_beside(self, settlement: Settlement) -> bool:
        """Settles while another connection claims: on the one that renews the lease, so it may not take long.

        False when it took longer, as when somebody has locked the table.
        """
        try:
            async with self._upkeep.transaction(self._lease / 10) as connection:
                await self._hands.settle(connection, settlement)
        except (TimeoutError, asyncpg.QueryCanceledError):
            return False
        return True

    # --- keeping the lease, and the house -----------------------------------------------------------------

    async def _renewing(self) -> None:
        while True:
            await anyio.sleep(self._lease / 3)
            await self._persistently(self._renew)

    async def _renew(self) -> None:
        self._moved = monotonic()
        async with self._upkeep.transaction() as connection:
            started = monotonic()
            alive = await self._hands.renew(connection)
        if not alive:
            self._tell(RelayFenced())
            self._say_whether_active()
        self._lease_ends = started + self._lease
        self._renewed.set()

    async def _taking_over(self) -> None:
        while True:
            taken = await self._persistently(self._take_over)
            if taken.relays:
                self._tell(RelaysDied(taken.relays, taken.messages))
                self._hands.look()
                self._wake.set()
            seconds = self._lease / 3
            if taken.next_look is not None:
                seconds = min(seconds, max(0.0, taken.next_look.total_seconds()))
            await anyio.sleep(seconds)

    async def _take_over(self) -> TakenOver:
        started = monotonic()
        orphans = started >= self._next_orphans
        taken = await self._look_after_the_dead(orphans=orphans)
        if orphans:
            self._next_orphans = after(started, START_INTERVAL)
        return taken

    async def _look_after_the_dead(self, *, orphans: bool) -> TakenOver:
        """Takes over from them, and goes to work if this relay stood by for them."""
        async with self._upkeep.transaction() as connection:
            taken = await self._membership.take_over(connection, orphans=orphans)
            goes_to_work = not self._membership.is_active and await self._membership.activate(connection)
        if goes_to_work:  # which is so when it is committed, and not before
            self._membership.is_active = True
            self._tell(RelayAtWork())
        return taken

    async def _cleaning(self) -> None:
        keep = self._settings.keep
        while keep is not None:
            started = monotonic()
            if await self._persistently(self._clean) < _CLEANUP_LIMIT:
                await anyio.sleep(after(started, _CLEANUP_INTERVAL) - monotonic())

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

    # --- its health -------------------------------------------------------------------------------------

    async def oldest(self) -> timedelta | None:
        """Asks the database how long the oldest has been waiting of all that is due and this relay's business.

        On the connection that claims, between two claims: so it needs no more of the pool than the relay does.
        """
        async with self._searching.transaction() as connection:
            return await self._hands.oldest(connection) if self._membership.is_active else None

    @property
    def has_ended(self) -> bool:
        """Whether `run` is over."""
        return self._stopped.is_set()

    def silent_one(self) -> str:
        """Says who it must have been, when the database was asked and no answer came."""
        pool = self._settings.pool
        if self._searching.is_connected or pool.get_idle_size() or pool.get_size() < pool.get_max_size():
            return "the database did not answer"
        return f"the pool had no connection to give (all {pool.get_size()} are in use)"

    def not_at_work(self) -> Iterator[str]:
        """Says why it claims nothing, other than for standing by."""
        if self._stopping.is_set():
            yield "the relay is stopping"
        elif not self._lease_ends:
            yield "the relay has not reached the database yet"

    def stuck(self) -> Iterator[str]:
        """Says what does not move, though everything that it could be waiting for has a time limit."""
        now, limit = monotonic(), self._settings.dispatch_timeout
        if self._calls and now - self._calls[0] > 2 * limit.total_seconds():
            yield f"a call of the destination, limited to {limit}, has not returned for {now - self._calls[0]:.0f} s"
        # Twice the lease and a transaction: it sleeps, waits for the connection, perhaps for a new one, and renews.
        if now - self._moved > 2 * (self._lease + self._upkeep.limit):
            yield f"the lease has not been renewed, nor has it been tried, for {now - self._moved:.0f} s"

    # --- telling ----------------------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        log(event, self._table)
        for hook in self._settings.hooks:
            try:
                hook(event)
            except Exception:
                _LOGGER.exception("a hook failed on %s", type(event).__name__)
