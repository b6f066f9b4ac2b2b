"""What a relay has in its hands that keeps an order: the lanes of the slots it owns, and nobody else's."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic
from typing import Any, Final, Literal
from uuid import UUID

from outbox._claims import (
    Batch,
    Buried,
    CommitStrategy,
    DueSearch,
    Postponed,
    Room,
    Settlement,
    Suspect,
    body_of,
    is_little_and_plain,
    settle,
    with_large_bodies,
)
from outbox._events import Event, SlotsOwned, WriterLate
from outbox._horizon import HIGHEST, LOWEST, Horizon
from outbox._lanes import Lanes
from outbox._membership import Membership
from outbox._message import Message
from outbox._outbox import Connection, Outbox, listed, position_of
from outbox._pace import START_INTERVAL, after
from outbox._queries import SLOTS, LaneQueries
from outbox._slots import Slots, mask_of

OnFailure = Literal["block", "park", "skip"]
"""What becomes of the messages behind one that failed."""

_BALANCE_SECONDS: Final = 0.25
"""Between two looks at who owns what; less when the lease is shorter than ten of them."""
_DEPARTED_SECONDS: Final = 0.5
"""Between two looks whether a parked lane may go on."""


@dataclass(slots=True)
class _Reading:
    """What a claim found, until its COMMIT makes it this relay's."""

    owner: UUID
    doubt: int
    """The one that the COMMIT resolves."""
    cursor: int
    rows: Sequence[Any] = ()
    free: list[Any] = field(default_factory=list)
    in_lanes: list[Any] = field(default_factory=list)
    suspect: Any = None
    found: set[int] = field(default_factory=set)
    """Lanes that have messages waiting."""
    emptied: set[int] = field(default_factory=set)
    """Lanes of which no message is waiting any more that is not in hand."""
    departed: set[int] = field(default_factory=set)
    """Heads of parked lanes that are dead letters no more."""
    before_head: int = HIGHEST
    """Where all messages are one lane, and it is blocked: the position before the first that waits."""


@dataclass(slots=True)
class _Gain:
    """What a look at the slots came to, until its COMMIT makes it so."""

    doubt: int
    """The one that the COMMIT resolves."""
    slots: dict[int, int] = field(default_factory=dict)
    lanes: "_Lanes | None" = None


@dataclass(slots=True)
class _Lanes:
    """Lanes that have messages waiting and, by lane, the dead letters that park it."""

    blocked: set[int]
    parked: dict[int, set[int]]


class Owning:
    """Owns slots, reads what falls into them up to the horizon, and keeps the messages of each lane in order.

    Nobody else reads a slot as long as its owner lives and keeps it, so what is read is in hand without a lock. A lane
    whose head waits for its next attempt is blocked: what follows waits behind it, in the table of waiting messages.

    Args:
        outbox: The table and codec.
        membership: This relay among the others.
        ordering: Whether each key has a lane, or all messages have one.
        on_failure: What becomes of those behind a message that failed.
        patience: Seconds after which a writer that does not end is passed over.
        batch_size: Messages in a batch at most.
        concurrency: Batches in delivery at most.
        commit: What becomes of a message that was delivered.
        lease: Seconds.
        poll_interval: Between two looks at what waits.
        tell: Receives events.
    """

    def __init__(
        self,
        outbox: Outbox,
        membership: Membership,
        *,
        ordering: Literal["key", "total"],
        on_failure: OnFailure,
        patience: timedelta,
        batch_size: int,
        concurrency: int,
        commit: CommitStrategy,
        lease: timedelta,
        poll_interval: timedelta,
        tell: Callable[[Event], None],
    ) -> None:
        self._codec = outbox.codec
        self._queries = outbox._queries
        self._lane_queries = LaneQueries(outbox._queries, ordering)
        self._membership = membership
        self._slots = Slots(self._lane_queries, SLOTS[ordering])
        self._on_failure = on_failure
        self._size = batch_size
        self._commit = commit
        self._balance_seconds = min(_BALANCE_SECONDS, lease.total_seconds() / 10)
        self._poll_interval = poll_interval.total_seconds()
        self._tell = tell
        self._slots_told = 0
        self._lanes = Lanes(batch_size * concurrency)
        self._horizon = Horizon(patience.total_seconds())
        self._due = DueSearch(self._lane_queries.claim_due)
        self._in_delivery: dict[UUID, int] = defaultdict(int)
        self._next_start = self._next_due = self._next_balance = self._next_departed = 0.0
        self._begin()

    def _begin(self) -> None:
        """Knows and holds nothing."""
        self._slots.forget(list(self._slots.owned))
        self._gained: _Gain | None = None
        self._cursor = self._read_upto = LOWEST
        self._blocked: set[int] = set()
        self._parked: dict[int, set[int]] = {}
        self._resuming: set[int] = set()
        self._reading: _Reading | None = None
        # Each transaction is a doubt until its COMMIT is answered; so is each failure of the database.
        self._doubts = self._known = 0
        self._doubtful: set[int] = set()
        self._is_stale = self._must_begin = False
        self._crash_suspect: int | None = None
        self._outcomes = Settlement(self._membership.owner)
        self._unsettled: list[Settlement] = []
        self._lanes.clear()

    # --- slots ------------------------------------------------------------------------------------------

    def _this_one(self) -> UUID:
        """Returns the name of this incarnation, having forgotten all of the former one.

        A relay finds out in the middle of anything that it was taken for dead. So what is done with a connection asks
        for the name once, at its beginning, and what it finds out counts for that name only.
        """
        if self._must_begin:
            self._begin()
        return self._membership.owner

    def balance_is_due(self) -> bool:
        """Says whether to look at who owns what."""
        return self._known == self._doubts and monotonic() >= self._next_balance

    async def balance(self, connection: Connection) -> bool:
        """Takes a fair share of the slots and hands over what is beyond it, once nothing of it is in hand.

        Only the COMMIT makes it so, and then `balanced` is called, if it returned True.
        """
        owner = self._this_one()
        if self._known != self._doubts:  # what the last one came to must be found out first
            return False
        share = await self._slots.share(connection, owner)
        self._next_balance = monotonic() + self._balance_seconds
        self._give_up(share.too_many)
        if self._slots.leaving:
            return await self._release(connection, owner)
        # A delivery from before this relay was taken for dead may still be under way, and out of order with new ones.
        if share.too_few and not any(count for name, count in self._in_delivery.items() if name != owner):
            return await self._gain(connection, owner, share.too_few)
        return False

    def _give_up(self, count: int) -> None:
        """Stops to read and deliver what falls into so many slots."""
        self._slots.give_up(count)
        if not self._slots.leaving:
            return
        for lane, messages in self._lanes.queued():
            going = {position_of(one) for one in messages if self._slots.of(one) in self._slots.leaving}
            if going:
                self._lanes.queue([one for one in self._lanes.pull(lane) if position_of(one) not in going])
                self._let_go(going)

    def _let_go(self, positions: set[int]) -> None:
        """Has nobody answer for these: the next owner of their slots reads them again."""
        self._outcomes.finished_claims += self._lanes.answer(positions)
        self._lanes.release(positions)
        if self._crash_suspect in positions:
            self._crash_suspect = None

    async def _release(self, connection: Connection, owner: UUID) -> bool:
        released = self._slots.leaving - set(map(self._slots.of, self._lanes.held.values()))
        if not released:
            return False
        self._slots.forget(released)  # before it is so: what is settled from here on has nothing to do with them
        self._forget_lanes(released)
        self._doubts += 1
        self._gained = _Gain(self._doubts)
        await connection.execute(self._lane_queries.durable)
        await connection.execute(self._queries.lock_relay, owner)
        await connection.execute(self._queries.let_go, owner, self._lanes.waiting)
        await connection.execute(self._lane_queries.release, owner, list(released))
        return True

    def _forget_lanes(self, slots: set[int]) -> None:
        """Knows nothing any more of lanes that are, or are about to be, somebody else's."""
        theirs = {lane for lane in (*self._blocked, *self._parked) if self._slots.of_lane(lane) in slots}
        self._blocked -= theirs
        for lane in theirs:
            self._parked.pop(lane, None)

    async def _gain(self, connection: Connection, owner: UUID, count: int) -> bool:
        self._doubts += 1
        self._gained = gain = _Gain(self._doubts)
        await connection.execute(self._lane_queries.durable)
        gain.slots = dict(await connection.fetch(self._lane_queries.gain, owner, count))
        if gain.slots:
            gain.lanes = await self._learn_lanes(connection, owner, gain.slots)
        return True

    def balanced(self) -> None:
        """Takes note of the slots that were handed over, or taken."""
        gain, self._gained = self._gained, None
        if gain is None or self._must_begin:
            return
        self._known = gain.doubt
        if gain.lanes:
            self._slots.owned |= gain.slots
            self._note(gain.lanes)
            self._cursor = LOWEST
            self._next_due = 0.0
        self._tell_slots()

    def _tell_slots(self) -> None:
        owned = 0 if self._must_begin else len(self._slots.owned)
        if owned != self._slots_told:
            self._slots_told = owned
            self._tell(SlotsOwned(owned))

    async def _learn_lanes(self, connection: Connection, owner: UUID, slots: Iterable[int]) -> _Lanes:
        """Finds out which lanes of these slots are blocked or parked, and sees that each can go on."""
        queries, mask = self._lane_queries, mask_of(slots)
        await connection.execute(queries.relane, mask)
        heads = await connection.fetch(queries.parked, mask)
        await self._park(connection, heads)  # what was about to be when the relay died that had it in its hands
        await connection.execute(queries.wake_heads, mask)
        parked: dict[int, set[int]] = {}
        for lane, head in heads:
            parked.setdefault(lane, set()).add(head)
        return _Lanes({row["lane"] for row in await connection.fetch(queries.blocked, mask, owner)}, parked)

    async def _park(self, connection: Connection, heads: Sequence[Iterable[int]]) -> None:
        """Has those that wait behind the heads, each told by its lane and position, join them."""
        if heads:
            lanes, positions = zip(*heads, strict=True)
            await connection.execute(self._lane_queries.park, lanes, positions)

    def _note(self, lanes: _Lanes) -> None:
        self._blocked |= self._stopping(lanes.blocked)
        for lane, heads in lanes.parked.items():
            self._parked.setdefault(lane, set()).update(heads)

    # --- claiming ---------------------------------------------------------------------------------------

    @property
    def is_half_full(self) -> bool:
        """Whether there is no need yet to read more."""
        return self._lanes.is_half_full and not self._must_begin

    @property
    def must_settle(self) -> bool:
        """Whether outcomes must be settled first: what is about to wait has to be seen by whoever looks for it."""
        return bool(self._unsettled or self._outcomes.postponed or self._outcomes.buried)

    @property
    def settles_beside(self) -> bool:
        """Whether what is known by now may be settled on another connection, while messages are read.

        Not in doubt, and not what waits or is dead: both concern what a reading looks at. Nor too much, or there would
        be no end to what was delivered and is still there to be delivered again.
        """
        is_certain = self._doubts - self._known == (self._reading is not None) and monotonic() < self._next_start
        return is_certain and is_little_and_plain([*self._unsettled, self._outcomes], self._lanes.half)

    def doubt(self) -> None:
        """Takes nothing for known any more: a server that crashed may have forgotten a settling."""
        self._doubts += 1
        self._doubtful = set(self._lanes.held)

    def look(self) -> None:
        """Looks at the waiting messages and the slots with the next claim."""
        self._next_due = self._next_balance = 0.0

    async def claim(self, connection: Connection) -> None:
        """Reads what there is room for; only the COMMIT makes it this relay's, and then `claimed` is called."""
        reading = await self._start(connection)
        await self._read(connection, reading, self._lanes.room())
        if self._parked and monotonic() >= self._next_departed:
            await self._unpark(connection, reading)
        if self._resuming or monotonic() >= self._next_due:
            if self._slots.is_one:  # nothing would be read behind a head that somebody has removed
                self._resuming |= self._blocked
            started = monotonic()
            more = await self._claim_waiting(connection, reading, self._lanes.room_for_waiting())
            self._next_due = 0.0 if more else after(started, self._poll_interval)

    async def claim_one(self, connection: Connection) -> None:
        """Reads one batch: of fresh messages, else of those that are due, else one suspect of a crash."""
        reading, room = await self._start(connection), Room(self._size, self._lanes.room().bytes)
        if self._parked:
            await self._unpark(connection, reading)
        await self._read(connection, reading, room)
        if not reading.rows:
            await self._claim_waiting(connection, reading, room)

    async def _start(self, connection: Connection) -> _Reading:
        owner, started = self._this_one(), monotonic()
        if self._known != self._doubts or started >= self._next_start:
            await self._recollect(connection, owner)
            self._next_start = after(started, START_INTERVAL)
        self._doubts += 1
        self._reading = _Reading(owner, self._doubts, self._cursor)
        return self._reading

    async def _recollect(self, connection: Connection, owner: UUID) -> None:
        """Asks the tables for everything that this relay should know of them, and notes there what it holds."""
        queries = self._lane_queries
        await self._membership.wait_for_own(connection)
        await self._slots.reread(connection, owner)
        notes = self._lanes.readings
        await connection.execute(queries.drop_claims_but, owner, [upto for upto, _ in notes])
        for upto, positions in notes:  # a server that crashed may have forgotten them
            await connection.execute(queries.claim, upto, owner, listed(positions))
        await connection.execute(self._queries.let_go, owner, self._lanes.waiting)
        await connection.execute(queries.hold_on, owner, self._lanes.waiting)
        self._horizon.reset()
        self._due.restart()
        self._cursor = LOWEST
        self._next_due = 0.0
        self._blocked, self._parked = self._about_to_wait()
        self._note(await self._learn_lanes(connection, owner, self._slots.owned))

    def _stopping(self, lanes: set[int]) -> set[int]:
        """Returns which of these lanes, of which messages are waiting, have to wait for them.

        Not one of which fresh messages are in hand: those are not behind what waits, which was delivered before, or
        came back from the dead letters.
        """
        if not lanes:
            return lanes
        about_to_wait = self._about_to_wait()[0]
        flowing = {message._lane for message in self._lanes.fresh()}
        return {lane for lane in lanes if lane in about_to_wait or lane not in flowing}

    def _about_to_wait(self) -> tuple[set[int], dict[int, set[int]]]:
        """Returns which lanes are blocked and parked by what is not settled yet."""
        parked: dict[int, set[int]] = {}
        unsettled = [*self._unsettled, self._outcomes]
        for settlement in unsettled:
            for lane, head in settlement.parked:
                parked.setdefault(lane, set()).add(head)
        return {one.lane for settlement in unsettled for one in settlement.postponed if one.lane is not None}, parked

    async def _read(self, connection: Connection, reading: _Reading, room: Room) -> None:
        slots = self._slots.at_work
        if room.messages < 1 or room.bytes < 1 or not slots:
            return
        if self._cursor >= self._horizon.bound:
            await self._look_ahead(connection)
            reading.cursor = self._cursor
        bound = min(self._horizon.bound, await self._before_head(connection, reading))
        if self._cursor >= bound:
            return
        in_hand = list(self._lanes.held) if self._cursor < self._read_upto else []
        found = await connection.fetch(
            self._lane_queries.read, mask_of(slots), self._cursor, bound, in_hand, room.messages
        )
        rows: Sequence[Any] = found
        if None in map(body_of, found):
            rows = await with_large_bodies(connection, self._queries, found, room.bytes)
        if rows:
            positions = [row[0] for row in rows]
            if not await connection.fetchval(self._lane_queries.claim, positions[-1], reading.owner, listed(positions)):
                return
            reading.rows = rows
        is_complete = len(rows) == len(found) < room.messages
        reading.cursor = bound if is_complete else rows[-1][0]

    async def _look_ahead(self, connection: Connection) -> None:
        """Lets the horizon rise, as far as the writers do."""
        last = await connection.fetchval(self._queries.last_position)
        if last <= self._horizon.bound and not self._horizon.has_passed_over:
            return
        writers = dict(await connection.fetch(self._queries.writers))
        if self._horizon.observe(last, writers, monotonic()):
            self._cursor = LOWEST  # somebody who was passed over has ended, and may have written below the bound
        if late := self._horizon.late(monotonic()):
            pids = [pid for pid in late.writers.values() if pid is not None]
            ages = dict(await connection.fetch(self._lane_queries.ages, pids))
            waited = timedelta(seconds=late.waited)
            for pid in late.writers.values():
                self._tell(WriterLate(pid, ages.get(pid) or waited, late.passed_over))

    async def _claim_waiting(self, connection: Connection, reading: _Reading, room: Room) -> bool:
        """Claims waiting messages whose time has come; returns whether there may be more."""
        slots = self._slots.at_work
        if room.messages < 1 or room.bytes < 1 or not slots:
            return bool(slots)
        queries, mask, owner = self._lane_queries, mask_of(slots), reading.owner
        read_so_far = self._read_so_far(reading)
        reading.free, more = await self._due.claim(connection, owner, room, mask)
        room = Room(room.messages - len(reading.free), room.bytes)
        if room.messages:
            due = [row["lane"] for row in await connection.fetch(queries.due_lanes, mask, room.messages)]
            more |= len(due) == room.messages
            reading.found = set(due)
            await self._claim_lanes(connection, reading, room, read_so_far)
        if self._crash_suspect is None:
            reading.suspect = await connection.fetchrow(queries.claim_crash_suspect, owner, mask, read_so_far)
        return more

    def _read_so_far(self, reading: _Reading) -> int:
        """Returns up to which position a lane may be claimed from: what is fresh below it was read, and fell in behind.

        So whoever takes over a slot finds the lowest of a lane first, wherever it is.
        """
        cursor = self._cursor if reading.rows else reading.cursor  # what this claim has read has not fallen in yet
        return HIGHEST if cursor >= min(self._horizon.bound, reading.before_head) > LOWEST else cursor

    async def _before_head(self, connection: Connection, reading: _Reading) -> int:
        """Returns up to where to read while all messages are behind one head: what comes after it need not fall in."""
        if self._slots.is_one and self._blocked:
            head = await connection.fetchval(self._lane_queries.head, next(iter(self._blocked)))
            reading.before_head = HIGHEST if head is None else head - 1
        return reading.before_head

    async def _claim_lanes(self, connection: Connection, reading: _Reading, room: Room, read_so_far: int) -> None:
        slots = self._slots.at_work
        self._resuming = {lane for lane in self._resuming if self._slots.of_lane(lane) in slots}
        asked = list(self._resuming | reading.found)[: room.messages]
        self._resuming.difference_update(asked)
        if not asked:
            return
        if not self._parked.keys().isdisjoint(asked):  # redriven, perhaps: then those behind must come along
            await self._unpark(connection, reading)
        each = max(1, min(self._size, room.messages // len(asked)))
        rows = await connection.fetch(
            self._lane_queries.claim_lanes, reading.owner, asked, each, max(1, room.bytes // len(asked)), read_so_far
        )
        reading.in_lanes = sorted(rows, key=lambda row: row["position"])
        left = {row["lane"] for row in await connection.fetch(self._lane_queries.lanes_left, reading.owner, asked)}
        reading.emptied = set(asked) - left
        if read_so_far < HIGHEST:
            self._resuming |= left - {row["lane"] for row in rows}

    async def _unpark(self, connection: Connection, reading: _Reading) -> None:
        """Has those go on who were parked behind a dead letter that is one no more."""
        started = monotonic()
        not_dead_yet = self._about_to_wait()[1]
        heads = [one for lane, heads in self._parked.items() for one in heads - not_dead_yet.get(lane, set())]
        rows = await connection.fetch(self._lane_queries.departed, heads)
        departed = [row["head"] for row in rows]
        reading.departed |= set(departed)
        if departed:
            # What came back is given up again behind another head, perhaps: a crash must not put it behind this one.
            await connection.execute(self._lane_queries.durable)
            await connection.execute(self._lane_queries.unpark, reading.owner, departed)
            self._next_due = 0.0
        self._next_departed = after(started, _DEPARTED_SECONDS)

    def go_ahead(self) -> bool:
        """Returns False: what its COMMIT fails to claim others may deliver, out of order."""
        return False

    def withdraw(self) -> None:
        """Does nothing: nothing goes ahead."""

    def claimed(self) -> int:
        """Queues what was read, each message in its lane; returns how many messages that are."""
        reading, self._reading = self._reading, None
        if reading is None or self._must_begin:
            return 0
        self._known = reading.doubt
        self._tell_slots()  # which were read anew, if they were in doubt
        self._cursor = reading.cursor
        self._read_upto = max(self._read_upto, reading.cursor)
        self._note_lanes(reading)
        self._queue_waiting(reading)
        self._queue_fresh(reading)  # which comes behind, when no other of its lane is waiting any more
        return len(reading.rows) + len(reading.free) + len(reading.in_lanes) + bool(reading.suspect)

    def _note_lanes(self, reading: _Reading) -> None:
        if reading.departed:
            for lane in list(self._parked):
                if self._parked[lane] & reading.departed:
                    self._parked[lane] -= reading.departed
                    self._blocked.add(lane)  # by those that came back, if any did
                    self._resuming.add(lane)
                    if not self._parked[lane]:
                        del self._parked[lane]
        # Unless something of it failed in the meantime, and is about to wait.
        self._blocked |= self._stopping(reading.found)
        self._blocked -= reading.emptied - self._about_to_wait()[0]

    def _queue_fresh(self, reading: _Reading) -> None:
        if not reading.rows:
            return
        stored, codec = Message._stored, self._codec
        messages = [stored(codec, *row) for row in reading.rows]
        self._lanes.hold_fresh(messages)
        stopped = self._blocked | self._parked.keys()
        if stopped and not stopped.isdisjoint([message._lane for message in messages]):
            for message in messages:
                if message._lane is not None and message._lane in stopped:
                    self._fall_in(message, message._lane)
            messages = [message for message in messages if message._lane not in stopped]
        self._lanes.queue(messages)

    def _queue_waiting(self, reading: _Reading) -> None:
        for row in reading.free:
            self._queue_one(row[:-2], alone=row["suspect"] is not None)
        for row in reading.in_lanes:
            self._queue_one((*row[:-3], row["lane"]), alone=row["suspect"] is not None)
        if row := reading.suspect:
            self._crash_suspect = self._queue_one((*row[:-3], row["lane"]), alone=True)

    def _queue_one(self, columns: Sequence[Any], *, alone: bool) -> int:
        message = Message._stored(self._codec, *columns)
        if message.position not in self._lanes.held:  # as it may be when a server forgot that it was claimed
            self._lanes.hold_waiting(message, alone=alone)
            self._lanes.queue([message])
        return position_of(message)

    # --- delivering -------------------------------------------------------------------------------------

    def take(self) -> Batch | None:
        """Returns the next batch to go out."""
        if self._is_stale:
            return None
        messages, lanes = self._lanes.take(self._size)
        if not messages:
            return None
        owner = self._membership.owner
        self._in_delivery[owner] += 1
        return Batch(owner, messages, suspect=self._suspicion(messages[0]), lanes=lanes)

    def _suspicion(self, message: Message) -> Suspect | None:
        if not self._lanes.is_alone(message):
            return None
        return Suspect.CRASH if message.position == self._crash_suspect else Suspect.BATCH

    def is_mine(self, batch: Batch) -> bool:
        """Says whether this relay still owns what it took."""
        return batch.owner == self._membership.owner and not self._is_stale

    def delivered(self, batch: Batch, messages: Sequence[Message]) -> None:
        """Notes what the destination accepted."""
        if self.is_mine(batch):
            positions = [message._position or 0 for message in messages]
            waited = self._lanes.waited(positions)
            self._outcomes.delivered_waiting += waited
            self._outcomes.delivered += [one for one in positions if one not in waited] if waited else positions
            self._outcomes.crash_suspects += batch.suspect is Suspect.CRASH
            self._outcomes.messages += len(positions)
            self._outcomes.finished_claims += self._lanes.answer(positions)

    def failed(self, batch: Batch, outcomes: Sequence[Postponed | Buried]) -> None:
        """Notes what failed, and has what follows in its lane fall in behind it."""
        if not outcomes or not self.is_mine(batch):
            return
        self._outcomes.crash_suspects += batch.suspect is Suspect.CRASH
        # By lane, what is about to wait already: who comes later stands behind it.
        ahead = {one.lane: one.position for one in self._outcomes.postponed if one.lane is not None}
        heads: set[int] = set()
        for outcome in sorted(outcomes, key=lambda outcome: outcome.position):
            lane = self._lanes.held[outcome.position]._lane
            if lane is None or (self._on_failure == "skip" and outcome.lane is None):
                self._fail(outcome)  # which has no place, or gives it up
            elif (head := self._parks(lane, outcome.position)) is not None:
                self._fail(_parked(outcome.position, outcome.attempts, lane, head, outcome.error))
            elif isinstance(outcome, Buried):
                self._bury(outcome, lane)
            elif lane in heads or ahead.get(lane, HIGHEST) < outcome.position:
                # No attempt of its own: with a head before it, it could not but fail.
                attempts = self._lanes.held[outcome.position].attempts
                self._fail(outcome._replace(delay=None, attempts=attempts, suspect=None, lane=lane))
            else:
                heads.add(lane)
                self._fail(outcome._replace(lane=lane))
                self._block(lane)

    def _bury(self, outcome: Buried, lane: int) -> None:
        if self._on_failure != "park":
            self._fail(outcome._replace(lane=lane))
            return
        head = outcome.position
        self._fail(outcome._replace(lane=lane, behind=head))
        self._parked.setdefault(lane, set()).add(head)
        self._outcomes.parked.append((lane, head))
        for message in self._lanes.pull(lane):
            self._fall_in(message, lane)

    def _block(self, lane: int) -> None:
        self._blocked.add(lane)
        for message in self._lanes.pull(lane):
            self._fall_in(message, lane)

    def _parks(self, lane: int, position: int) -> int | None:
        """Returns the dead letter that a message of a parked lane stands behind."""
        return max((head for head in self._parked.get(lane, ()) if head < position), default=None)

    def _fall_in(self, message: Message, lane: int) -> None:
        """Puts a message that was not tried behind the head of its lane."""
        position, suspect = position_of(message), self._suspicion(message)
        attempts = message.attempts
        if suspect is Suspect.CRASH:  # it was counted before the delivery that does not come
            attempts -= 1
            self._outcomes.crash_suspects += 1
        if (head := self._parks(lane, position)) is not None:
            self._fail(_parked(position, attempts, lane, head))
        else:
            self._blocked.add(lane)
            self._fail(Postponed(position, None, attempts, suspect, lane=lane))

    def _fail(self, outcome: Postponed | Buried) -> None:
        outcomes = self._outcomes
        outcomes.messages += 1
        outcomes.set_aside.append(outcome.position)
        if isinstance(outcome, Postponed):
            outcomes.postponed.append(outcome)
        else:
            outcomes.buried.append(outcome)
        outcomes.finished_claims += self._lanes.answer([outcome.position])

    def put_back(self, batch: Batch) -> bool:
        """Has a batch go out again, each message as the first of its lane, behind all other lanes in hand."""
        if self.is_mine(batch):
            going = {position_of(one) for one in batch.messages if self._slots.of(one) in self._slots.leaving}
            self._lanes.put_back([one for one in batch.messages if position_of(one) not in going])
            self._let_go(going)
        return True

    def done(self, batch: Batch, left: Sequence[Message]) -> None:
        """Takes a batch back. If any is left the relay is stopping, and nothing of its lanes goes out any more."""
        self._in_delivery[batch.owner] -= 1
        if not self._in_delivery[batch.owner]:
            del self._in_delivery[batch.owner]
        if self.is_mine(batch) and not left:
            self._lanes.finish(batch.lanes)

    # --- settling ---------------------------------------------------------------------------------------

    def to_settle(self) -> Settlement | None:
        """Returns what is to be settled next."""
        if self._is_stale:
            return None
        if self._outcomes.messages or self._outcomes.finished_claims:
            self._unsettled.append(self._outcomes)
            self._outcomes = Settlement(self._membership.owner)
        return self._unsettled[0] if self._unsettled else None

    async def settle(self, connection: Connection, settlement: Settlement) -> None:
        """Writes down what became of messages, if every slot is still this relay's in the same epoch.

        Only the COMMIT makes it so, and then `settled` is called.
        """
        if self._is_stale or settlement.owner != self._membership.owner:
            return
        epochs, held = self._slots.epochs, dict(self._lanes.held)
        # And one more, for being alive: a relay that owns nothing may be dead as well.
        if await connection.fetchval(self._lane_queries.owned, settlement.owner, epochs) < len(epochs) + 1:
            self._is_stale = True
        if self._is_stale:
            return
        if self._known != self._doubts and not settlement.is_plain:  # a server that crashed may have forgotten whose
            await connection.execute(self._lane_queries.hold_on, settlement.owner, self._lanes.waiting)
        if settlement.postponed or settlement.buried:
            # What is to come in order goes by where the head is. A crash of the server must not put it back.
            await connection.execute(self._lane_queries.durable)

        def ids(positions: Iterable[int]) -> list[UUID]:
            return [held[position].id for position in positions]

        in_doubt = not self._doubtful.isdisjoint([*settlement.delivered, *settlement.set_aside])
        await settle(connection, self._queries, settlement, self._commit, ids, in_doubt=in_doubt)
        await self._park(connection, settlement.parked)

    def settled(self, settlement: Settlement) -> bool:
        """Lets what was settled out of hand; returns whether others may be claimed in its place."""
        if self._is_stale or settlement.owner != self._membership.owner:  # nothing was settled
            return False
        del self._unsettled[0]  # which it was
        answered: list[Postponed | Buried] = [*settlement.postponed, *settlement.buried]
        positions = [*settlement.delivered, *settlement.delivered_waiting, *(outcome.position for outcome in answered)]
        if self._blocked:
            lanes = {held._lane for position in positions if (held := self._lanes.held.get(position))}
            self._resuming |= self._blocked & lanes
        self._lanes.release(positions)
        if settlement.crash_suspects:
            self._crash_suspect = None
            self._next_due = 0.0
        return bool(self._resuming or answered)

    # --- leaving ----------------------------------------------------------------------------------------

    async def oldest(self, connection: Connection) -> timedelta | None:
        """Returns how long the oldest has been waiting, of those due in the slots that this relay owns."""
        if not (owned := mask_of(self._slots.owned)):
            return None
        fresh = min((position_of(message) - 1 for message in self._lanes.fresh()), default=HIGHEST)
        age: timedelta | None = await connection.fetchval(self._lane_queries.oldest, owned, min(self._cursor, fresh))
        return age

    async def renew(self, connection: Connection) -> bool:
        """Renews the lease; False when it was lost, and the relay has begun anew under another name."""
        if await self._membership.renew(connection) and not self._is_stale:
            return True
        self._is_stale = self._must_begin = True
        self._tell_slots()
        self._membership.rename()
        await self._membership.register(connection)
        return False

    async def leave(self, connection: Connection) -> None:
        """Lets go of everything, known or not."""
        owner = self._membership.owner
        await connection.execute(self._lane_queries.durable)
        await self._membership.lock(connection)
        await connection.execute(self._queries.let_go, owner, [])
        await connection.execute(self._queries.drop_all_claims, [owner])
        await connection.execute(self._lane_queries.release, owner, list(range(SLOTS["key"])))
        await self._membership.leave(connection)
        self._slots.forget(list(self._slots.owned))
        self._tell_slots()


def _parked(position: int, attempts: int, lane: int, head: int, error: str | None = None) -> Buried:
    because = f"parked behind the dead letter at position {head}"
    return Buried(position, attempts, f"{because}: {error}" if error else because, lane, head)
