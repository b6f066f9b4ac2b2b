"""What one of many competing relays does to the table: it claims messages and settles them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from operator import itemgetter
from time import monotonic
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg

from outbox._horizon import LOWEST, Horizon
from outbox._membership import Membership
from outbox._message import Message
from outbox._outbox import Connection, Outbox, affected, listed
from outbox._queries import Queries

_BODY: Final = 5
"""Where in a row of lock_fresh, or of read, the body is."""
body_of: Final = itemgetter(_BODY)
SMALLEST_WINDOW: Final = 200
"""Messages that a relay may hold at least, so that small batches are not claimed one by one."""
WINDOW_BYTES: Final = 16 * 1024 * 1024
"""Bytes of bodies that a relay holds at most, about: one message at least is held, however large it is."""
EVER: Final = datetime(1, 1, 1, tzinfo=UTC), LOWEST
"""Before every waiting message."""


class CommitStrategy(Enum):
    """What becomes of a message that was delivered."""

    DELETE = "delete"
    """It is deleted."""
    MARK = "mark"
    """It is kept with the time of its dispatch, until it is cleaned up."""


class Suspect(Enum):
    """Why a waiting message is tried alone."""

    BATCH = "batch"
    """The batch it was in failed as a whole, and one of them may be the reason."""
    CRASH = "crash"
    """Its process died, and it may have been the killer: its attempts are counted before the dispatch."""


class Room(NamedTuple):
    """How much more may be claimed."""

    messages: int
    bytes: int


class Claim:
    """Fresh messages that were claimed together, until the last of them is settled."""

    __slots__ = ("in_doubt", "outstanding", "size", "upto")

    def __init__(self, upto: int, rows: Sequence[Any]) -> None:
        self.upto = upto
        self.in_doubt = False
        self.outstanding = len(rows)
        self.size = sum([len(row[_BODY]) for row in rows])


class Batch(NamedTuple):
    """Messages to be dispatched together, of one claim or, with none, from among the waiting."""

    owner: UUID
    messages: Sequence[Message]
    claim: Claim | None = None
    suspect: Suspect | None = None
    lanes: Sequence[int | None] = ()
    """Which are busy with it, where an order is kept."""


class Rows(NamedTuple):
    """A batch of a claim whose messages are not made yet: that is done while the next claim waits for the database."""

    owner: UUID
    rows: Sequence[Any]
    claim: Claim


class Postponed(NamedTuple):
    """A message that was not delivered and is due again after the delay."""

    position: int
    delay: timedelta | None
    """None when it stands behind the head of its lane, and has no due time of its own."""
    attempts: int
    suspect: Suspect | None = None
    error: str | None = None
    lane: int | None = None
    """In which it keeps its place, if it does."""


class Buried(NamedTuple):
    """A message that becomes a dead letter."""

    position: int
    attempts: int
    error: str
    lane: int | None = None
    """In which it had its place, if it did."""
    behind: int | None = None
    """The position of the dead letter that parks its lane: its own, or that of the one it was parked behind."""


@dataclass(slots=True)
class Settlement:
    """What became of messages, gathered so that many are settled by few statements in one transaction.

    It is the owner's under whose name they were claimed: what that one lost by being declared dead is not touched.
    """

    owner: UUID
    delivered: list[int] = field(default_factory=list)
    delivered_waiting: list[int] = field(default_factory=list)
    set_aside: list[int] = field(default_factory=list)
    postponed: list[Postponed] = field(default_factory=list)
    buried: list[Buried] = field(default_factory=list)
    finished_claims: list[int] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    """Of which it is, where no order is kept."""
    parked: list[tuple[int, int]] = field(default_factory=list)
    """Lanes whose waiting messages are parked, each with the position of the head."""
    messages: int = 0
    crash_suspects: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but fresh messages that were delivered: to settle these twice, or late, is harmless."""
        return self.messages == len(self.delivered)

    def delivers(self, batch: Batch, messages: Iterable[Message]) -> None:
        """Adds messages that their destination accepted."""
        positions = [message._position or 0 for message in messages]
        (self.delivered if batch.claim else self.delivered_waiting).extend(positions)
        self._settles(batch, len(positions))

    def fails(self, batch: Batch, outcomes: Sequence[Postponed | Buried]) -> None:
        """Adds messages that wait or are given up."""
        if batch.claim:
            self.set_aside.extend(outcome.position for outcome in outcomes)
        for outcome in outcomes:
            if isinstance(outcome, Postponed):
                self.postponed.append(outcome)
            else:
                self.buried.append(outcome)
        self._settles(batch, len(outcomes))

    def _settles(self, batch: Batch, count: int) -> None:
        self.messages += count
        self.crash_suspects += batch.suspect is Suspect.CRASH and count > 0
        self.batches.append(batch)
        if batch.claim:
            batch.claim.outstanding -= count
            if not batch.claim.outstanding:
                self.finished_claims.append(batch.claim.upto)


def is_little_and_plain(settlements: Sequence[Settlement], most: int) -> bool:
    """Says whether these are plain, and no more than so many messages together."""
    return sum(one.messages for one in settlements) <= most and all(one.is_plain for one in settlements)


async def settle(
    connection: Connection,
    queries: Queries,
    settlement: Settlement,
    commit: CommitStrategy,
    ids: Callable[[Iterable[int]], list[UUID]],
    *,
    in_doubt: bool,
) -> None:
    """Writes down what became of the messages; running it a second time changes nothing.

    Claims are locked before messages, as in a take-over.

    Args:
        connection: With a transaction open.
        queries: Of the outbox.
        settlement: What became of them.
        commit: Whether those delivered are kept.
        ids: Of the messages at these positions.
        in_doubt: Whether the database may have forgotten what was claimed, and given the positions to other messages.
    """
    mark, delivered, waiting = commit is CommitStrategy.MARK, settlement.delivered, settlement.delivered_waiting
    set_aside = settlement.set_aside
    if not delivered or in_doubt or not await _settle_claimed(connection, queries, settlement, mark=mark):
        if settlement.finished_claims:
            await connection.execute(queries.drop_claims, settlement.owner, settlement.finished_claims)
        if delivered or in_doubt:
            # Some may have been moved, when this relay was taken for dead: they are not to be delivered again.
            fresh = await _still_fresh(connection, queries, [*delivered, *set_aside], ids)
            waiting = waiting + [position for position in delivered if position not in fresh]
            delivered = [position for position in delivered if position in fresh]
            set_aside = [position for position in set_aside if position in fresh]
            if set_aside:  # what another relay has claimed since is its own
                rows = await connection.fetch(queries.not_claimed_by_others, settlement.owner, listed(set_aside))
                set_aside = [row["position"] for row in rows]
        if delivered:
            await connection.execute(queries.mark if mark else queries.remove, listed(delivered))
    if waiting:
        statement = queries.mark_waiting if mark else queries.remove_waiting
        await connection.execute(statement, listed(waiting), ids(waiting))
    if set_aside:
        await connection.execute(queries.set_aside, settlement.owner, listed(set_aside))
    await _settle_failures(connection, queries, settlement)


async def _settle_claimed(connection: Connection, queries: Queries, settlement: Settlement, *, mark: bool) -> bool:
    """Settles what was delivered, and the claims; False when it is not what the table says of them."""
    delivered, claims = settlement.delivered, {batch.claim.upto for batch in settlement.batches if batch.claim}
    statement = queries.mark_claimed if mark else queries.remove_claimed
    status = await connection.execute(
        statement, listed(delivered), settlement.owner, list(claims), settlement.finished_claims
    )
    return affected(status) == len(delivered)


async def _still_fresh(
    connection: Connection, queries: Queries, positions: list[int], ids: Callable[[Iterable[int]], list[UUID]]
) -> set[int]:
    """Returns at which of these positions the same message is still fresh, and keeps it so."""
    rows = await connection.fetch(queries.still_fresh, listed(positions), ids(positions))
    return {row["position"] for row in rows}


async def _settle_failures(connection: Connection, queries: Queries, settlement: Settlement) -> None:
    owner = settlement.owner
    if postponed := settlement.postponed:
        await connection.execute(
            queries.postpone,
            owner,
            [one.position for one in postponed],
            [one.delay for one in postponed],
            [one.attempts for one in postponed],
            [one.suspect.value if one.suspect else None for one in postponed],
            [one.error for one in postponed],
            [one.lane for one in postponed],
        )
    if buried := settlement.buried:
        await connection.execute(
            queries.bury,
            owner,
            [one.position for one in buried],
            [one.attempts for one in buried],
            [one.error for one in buried],
            [one.lane for one in buried],
            [one.behind for one in buried],
        )


async def with_large_bodies(
    connection: Connection, queries: Queries, rows: Sequence[asyncpg.Record], room: int
) -> list[Any]:
    """Completes rows with their bodies, one at least, and as many as there is room for."""
    complete: list[Any] = []
    for row in rows:
        if row[_BODY] is not None:
            complete.append(row)
        elif room > 0 or not complete:
            body = await connection.fetchval(queries.body, row[0])
            room -= len(body)
            complete.append((*row[:_BODY], body, *row[_BODY + 1 :]))
        else:
            break
    return complete


class DueSearch:
    """The search for waiting messages whose time has come."""

    def __init__(self, statement: str) -> None:
        self._statement = statement
        self.restart()

    def restart(self) -> None:
        """Begins with the earliest again."""
        self._from = EVER

    async def claim(
        self, connection: Connection, owner: UUID, room: Room, *mine: int
    ) -> tuple[list[asyncpg.Record], bool]:
        """Claims those for which there is room; returns their rows in order, and whether there may be more."""
        if room.messages < 1 or room.bytes < 1:
            return [], True
        rows = await connection.fetch(self._statement, owner, *self._from, room.messages, room.bytes, *mine)
        rows.sort(key=lambda row: (row["due_at"], row["position"]))
        more = len(rows) == room.messages or sum(len(row["payload"]) for row in rows) >= room.bytes
        # Behind what was just claimed lie dead rows: the next search begins beyond them, until one comes back short.
        self._from = (rows[-1]["due_at"], rows[-1]["position"]) if more else EVER
        return rows, more


class Claims:
    """The claims of one relay, on whatever connection it is given, inside the transaction open there.

    A claim never holds a transaction open while a destination works: it is a row that names the messages and
    their owner, and an owner whose lease has run out is dead. Fresh messages are searched for beyond a cursor;
    what commits late, behind it, is found by a sweep from the floor, below which nothing can appear any more.
    """

    def __init__(self, outbox: Outbox, membership: Membership) -> None:
        self._codec = outbox.codec
        self._queries = outbox._queries
        self._membership = membership
        self._cursor = self._floor = self._start = LOWEST
        self._due = DueSearch(outbox._queries.claim_due)
        self._horizon = Horizon(patience=math.inf)

    # --- claiming ---------------------------------------------------------------------------------------

    async def find_start(self, connection: Connection) -> None:
        """Forgets all bounds, and puts the cursor before the lowest message that is pending.

        A bound is proven by what was seen in this database while it ran: a server that crashed may have forgotten a
        claim or given out positions anew, a restored or truncated table begins anywhere.
        """
        self._floor = LOWEST
        self._horizon.reset()
        self._due.restart()
        last = await self._observe(connection)
        lowest = await connection.fetchval(self._queries.lowest_fresh, LOWEST, last)
        self._cursor = self._start = last if lowest is None else lowest - 1
        if self._horizon.bound > LOWEST:  # seen before the look: so this one need not be done again for the floor
            self._floor = min(self._horizon.bound, self._cursor)

    async def claim_fresh(self, connection: Connection, room: Room, size: int, *, sweep: bool) -> list[Rows]:
        """Claims the next messages beyond the cursor or, in a sweep, beyond the floor, as batches of this size."""
        owner, bound = self._membership.owner, self._floor if sweep else self._cursor
        rows = await connection.fetch(self._queries.lock_fresh, bound, room.messages)
        if None in map(body_of, rows):
            rows = await with_large_bodies(connection, self._queries, rows, room.bytes)
        if not rows:
            return []
        positions = [row[0] for row in rows]
        claimed = await connection.fetchrow(self._queries.record_claim, bound, owner, listed(positions), len(positions))
        self._cursor = max(self._cursor, positions[-1])
        if claimed is None:
            return []
        if claimed["positions"] is not None:
            mine = set(claimed["positions"])
            rows = [row for row in rows if row[0] in mine]
        claim = Claim(claimed["upto"], rows)
        return [Rows(owner, rows[start : start + size], claim) for start in range(0, len(rows), size)]

    def made(self, batch: Rows) -> Batch:
        """Makes the messages of a batch."""
        stored, codec = Message._stored, self._codec
        return Batch(batch.owner, [stored(codec, *row) for row in batch.rows], batch.claim)

    async def reconcile(self, connection: Connection, claims: Iterable[int], waiting: Iterable[int]) -> None:
        """Lets go of whatever this relay holds in the table without knowing it: its COMMIT got no answer.

        Args:
            connection: With a transaction open.
            claims: The claims it does know of.
            waiting: The positions of the waiting messages it does know of.
        """
        rows = await connection.fetch(self._queries.unknown_claims, self._membership.owner, list(claims))
        if positions := [position for row in rows for position in row["positions"]]:
            await connection.execute(self._queries.set_aside, self._membership.owner, listed(positions))
            await connection.execute(self._queries.drop_claims, self._membership.owner, [row["upto"] for row in rows])
        await connection.execute(self._queries.let_go, self._membership.owner, list(waiting))

    async def claim_due(self, connection: Connection, room: Room) -> tuple[list[Batch], bool]:
        """Claims waiting messages whose time has come, the suspects of a batch each as a batch of its own.

        Returns the batches, and whether there may be more.
        """
        owner = self._membership.owner
        rows, more = await self._due.claim(connection, owner, room)
        company = [Message._stored(self._codec, *row[:-2]) for row in rows if row["suspect"] is None]
        alone = [Message._stored(self._codec, *row[:-2]) for row in rows if row["suspect"] is not None]
        batches = [Batch(owner, company)] if company else []
        return batches + [Batch(owner, [message], suspect=Suspect.BATCH) for message in alone], more

    async def claim_crash_suspect(self, connection: Connection) -> Batch | None:
        """Claims one suspect of a crash, counting the attempt."""
        owner = self._membership.owner
        row = await connection.fetchrow(self._queries.claim_crash_suspect, owner)
        if row is None:
            return None
        return Batch(owner, [Message._stored(self._codec, *row[:-3])], suspect=Suspect.CRASH)

    # --- the floor --------------------------------------------------------------------------------------

    @property
    def is_behind(self) -> bool:
        """Whether the floor could be raised."""
        return self._floor < self._cursor

    async def oldest(self, connection: Connection, claims: Iterable[int]) -> timedelta | None:
        """Returns how long the oldest of all that are due has been waiting: of these claims' messages, and nobody's.

        The search for fresh ones begins at the floor. For as long as there is none it begins where `find_start` left
        off, above all that is marked or dead: what commits late, below that, is missed until the floor is proven.
        """
        bound = self._start if self._floor == LOWEST else self._floor
        age: timedelta | None = await connection.fetchval(
            self._queries.oldest, self._membership.owner, bound, list(claims)
        )
        return age

    async def raise_floor(self, connection: Connection) -> None:
        """Moves the floor up to below the lowest message that is, or may still become, pending and unclaimed.

        The horizon says how far all messages are there to be seen.
        """
        await self._observe(connection)
        if (bound := self._horizon.bound) > self._floor:
            lowest = await connection.fetchval(self._queries.lowest_fresh, self._floor, bound)
            self._floor = max(self._floor, bound if lowest is None else lowest - 1)
            self._cursor = max(self._cursor, self._floor)

    async def _observe(self, connection: Connection) -> int:
        """Lets the horizon rise, and returns the last position that was given out."""
        last: int = await connection.fetchval(self._queries.last_position)
        self._horizon.observe(last, dict(await connection.fetch(self._queries.writers)), monotonic())
        return last
