"""What a relay has in its hands that competes with others for each batch: no order is kept."""

from collections import deque
from collections.abc import Iterable, Sequence
from datetime import timedelta
from time import monotonic
from typing import Final
from uuid import UUID

from outbox._claims import (
    Batch,
    Buried,
    Claims,
    CommitStrategy,
    Postponed,
    Room,
    Rows,
    Settlement,
    Suspect,
    is_little_and_plain,
    settle,
)
from outbox._holdings import Holdings
from outbox._membership import Membership
from outbox._message import Message
from outbox._outbox import Connection, Outbox, position_of
from outbox._pace import START_INTERVAL, after

_FLOOR_INTERVAL: Final = 0.25
"""Seconds between two attempts to raise the floor."""


class Competing:
    """Every message it holds is in exactly one place: ready, in delivery, or to be settled."""

    def __init__(
        self,
        outbox: Outbox,
        membership: Membership,
        *,
        batch_size: int,
        concurrency: int,
        commit: CommitStrategy,
        poll_interval: timedelta,
    ) -> None:
        self._queries = outbox._queries
        self._membership = membership
        self._size = batch_size
        self._commit = commit
        self._poll_interval = poll_interval.total_seconds()
        self._claims = Claims(outbox, membership)
        self._holdings = Holdings(batch_size * concurrency)
        self._ready: deque[Batch | Rows] = deque()
        self._claimed: list[Batch | Rows] = []
        self._ahead: Rows | None = None
        self._outcomes = Settlement(membership.owner)
        self._unsettled: list[Settlement] = []
        self._put_back = 0
        """Batches in a row, since the destination has accepted anything."""
        self._in_doubt = False
        self._next_start = self._next_sweep = self._next_due = self._next_floor = 0.0

    # --- claiming ---------------------------------------------------------------------------------------

    @property
    def is_half_full(self) -> bool:
        """Whether there is no need yet to claim more."""
        return self._holdings.is_half_full

    must_settle = True
    """What cannot be settled beside a claim is settled first."""

    @property
    def settles_beside(self) -> bool:
        """Whether what is known by now may be settled on another connection, while a claim is made.

        What waits, or is dead, may not: settled late, after a new claim of the same message, it would let go of it. Nor
        may too much, or there would be no end to what the table says is in this relay's hands.
        """
        return is_little_and_plain([*self._unsettled, self._outcomes], self._holdings.half)

    def doubt(self) -> None:
        """Takes nothing for known any more: a server that crashed may have forgotten a settling."""
        self._in_doubt = True
        self._next_start = 0.0
        self._holdings.doubt()

    def look(self) -> None:
        """Looks for waiting messages with the next claim."""
        self._next_due = 0.0

    async def balance(self, connection: Connection) -> bool:  # noqa: ARG002 -- see `Hands`
        """Does nothing: whoever competes shares nothing out."""
        return False

    def balanced(self) -> None:
        """Does nothing, see `balance`."""

    def balance_is_due(self) -> bool:
        """Returns False, see `balance`."""
        return False

    async def claim(self, connection: Connection) -> None:
        """Claims what there is room for; only the COMMIT makes it so, and then `claimed` is called."""
        await self._reconcile(connection)
        claims, started = self._claims, monotonic()
        sweep, look_for_due = started >= self._next_sweep, started >= self._next_due
        if started >= self._next_start:
            await claims.find_start(connection)
            self._next_start = after(started, START_INTERVAL)
        if started >= self._next_floor and claims.is_behind:
            await claims.raise_floor(connection)
            self._next_floor = after(started, _FLOOR_INTERVAL)
        self._claimed = [*await claims.claim_fresh(connection, self._holdings.room(), self._size, sweep=sweep)]
        if sweep:
            self._next_sweep = after(started, 0.0)
        if look_for_due:
            started = monotonic()
            more = await self._claim_due(connection, self._holdings.room_for_waiting())
            self._next_due = 0.0 if more else after(started, self._poll_interval)

    async def claim_one(self, connection: Connection) -> None:
        """Claims one batch: of fresh messages, else of those that are due, else one suspect of a crash."""
        await self._reconcile(connection)
        room = Room(self._size, self._holdings.room().bytes)
        self._claimed = [*await self._claims.claim_fresh(connection, room, self._size, sweep=True)]
        if not self._claimed:
            await self._claim_due(connection, room)

    async def _reconcile(self, connection: Connection) -> None:
        """Lets go of what the last claim, its outcome unknown, may have left."""
        if self._in_doubt:
            await self._membership.wait_for_own(connection)
            await self._claims.reconcile(connection, self._holdings.claims, self._holdings.waiting)
        self._in_doubt = True

    async def _claim_due(self, connection: Connection, room: Room) -> bool:
        batches, more = await self._claims.claim_due(connection, room)
        self._claimed += batches
        # One suspect of a crash at a time: if it kills this process too, it must be clear which one it was.
        if not self._holdings.holds_crash_suspect and (suspect := await self._claims.claim_crash_suspect(connection)):
            self._claimed.append(suspect)
        return more

    def go_ahead(self) -> bool:
        """Has what was claimed ready to go out though its COMMIT is under way; returns whether it is.

        If it is a single batch, since others would not go out so soon. And not what waited: if it kills the process,
        the attempt must have been counted.
        """
        if len(self._claimed) != 1 or not isinstance(self._claimed[0], Rows):
            return False
        self._ahead = self._claimed[0]
        self._make_ready()
        return True

    def withdraw(self) -> None:
        """Takes back what went ahead and has not gone out, when its COMMIT has failed, and doubts what has."""
        ahead, self._ahead = self._ahead, None
        if ahead and any(batch is ahead for batch in self._ready):
            self._ready = deque(batch for batch in self._ready if batch is not ahead)
            self._holdings.forget(ahead)
        self.doubt()

    def claimed(self) -> int:
        """Has what was claimed ready to go out; returns how many messages that are."""
        self._in_doubt = False
        ahead, self._ahead = self._ahead, None
        return len(ahead.rows) if ahead else self._make_ready()

    def _make_ready(self) -> int:
        batches, self._claimed = self._claimed, []
        self._ready.extend(batches)
        return self._holdings.add(batches)

    # --- delivering -------------------------------------------------------------------------------------

    def take(self) -> Batch | None:
        """Returns the next batch to go out."""
        if not self._ready:
            return None
        batch = self._ready.popleft()
        return batch if isinstance(batch, Batch) else self._claims.made(batch)

    def is_mine(self, batch: Batch) -> bool:
        """Says whether this relay still holds what it took."""
        return batch.owner == self._membership.owner

    def delivered(self, batch: Batch, messages: Sequence[Message]) -> None:
        """Notes what the destination accepted."""
        self._put_back = 0
        self._holdings.answer(len(messages))
        self._outcomes_of(batch).delivers(batch, messages)

    def failed(self, batch: Batch, outcomes: Sequence[Postponed | Buried]) -> None:
        """Notes what failed."""
        self._holdings.answer(len(outcomes))
        self._outcomes_of(batch).fails(batch, outcomes)

    def put_back(self, batch: Batch) -> bool:
        """Has a batch go out again behind all others in hand, which the destination may accept.

        False when it has accepted none of them, and there is no room to claim others: then this one must make room.
        """
        self._put_back += 1
        if self.is_half_full and self._put_back > len(self._ready):
            return False
        self._ready.append(batch)
        return True

    def done(self, batch: Batch, left: Sequence[Message]) -> None:
        """Takes a batch back; what is left is due at once for any relay, no attempt spent, since none was answered."""
        spent = 1 if batch.suspect is Suspect.CRASH else 0
        back = [Postponed(position_of(one), timedelta(), one.attempts - spent, batch.suspect) for one in left]
        if back:
            self.failed(batch, back)

    def _outcomes_of(self, batch: Batch) -> Settlement:
        if self._outcomes.owner != batch.owner:  # claimed before, or after, this relay was taken for dead
            self._unsettled.append(self._outcomes)
            self._outcomes = Settlement(batch.owner)
        return self._outcomes

    # --- settling ---------------------------------------------------------------------------------------

    def to_settle(self) -> Settlement | None:
        """Returns what is to be settled next."""
        if self._outcomes.messages:
            self._unsettled.append(self._outcomes)
            self._outcomes = Settlement(self._outcomes.owner)
        return self._unsettled[0] if self._unsettled else None

    async def settle(self, connection: Connection, settlement: Settlement) -> None:
        """Writes down what became of messages; only the COMMIT makes it so, and then `settled` is called."""
        batches = settlement.batches
        in_doubt = any(batch.claim and batch.claim.in_doubt for batch in batches)

        def ids(positions: Iterable[int]) -> list[UUID]:
            by_position = {position_of(message): message.id for batch in batches for message in batch.messages}
            return [by_position[position] for position in positions]

        if in_doubt:  # by a COMMIT that got no answer, and may still be under way: no claim is to appear behind this
            await self._membership.wait_for_own(connection)
        await settle(connection, self._queries, settlement, self._commit, ids, in_doubt=in_doubt)

    def settled(self, settlement: Settlement) -> bool:
        """Forgets what was settled; returns whether others may be claimed in its place."""
        del self._unsettled[0]  # which it was
        self._holdings.remove(settlement)
        if settlement.crash_suspects:
            self._next_due = 0.0
        return bool(settlement.delivered_waiting or settlement.postponed or settlement.buried)

    # --- leaving ----------------------------------------------------------------------------------------

    async def oldest(self, connection: Connection) -> timedelta | None:
        """Returns how long the oldest has been waiting, of those due that are in hand or nobody's."""
        return await self._claims.oldest(connection, self._holdings.claims)

    async def renew(self, connection: Connection) -> bool:
        """Renews the lease; False when it was lost, and the relay has begun anew under another name."""
        if await self._membership.renew(connection):
            return True
        self._membership.rename()
        await self._membership.register(connection)
        return False

    async def leave(self, connection: Connection) -> None:
        """Lets go of everything, known or not."""
        await self._membership.lock(connection)
        await self._claims.reconcile(connection, (), ())
        await self._membership.leave(connection)
