"""A relay among the others: its lease, who works with it, and what becomes of those who died."""

from datetime import timedelta
from typing import Final, NamedTuple
from uuid import UUID, uuid4

from outbox._outbox import Connection, Outbox, affected
from outbox._queries import Ordering

_MARGIN: Final = timedelta(milliseconds=20)
"""How long after a lease is to run out one looks whether it did."""


class TakenOver(NamedTuple):
    """What became of relays that died."""

    relays: int
    messages: int
    """How many are suspects of their death, and are tried one by one."""
    next_look: timedelta | None
    """When the next relay may be dead; None when there is no other."""


class Membership:
    """The row of one relay among those that live, and its leases on the rows of the dead.

    A relay whose lease has run out is dead, whatever it thinks: others delete its row and take over what it held. If
    it lives it finds its row gone, takes a new name and starts anew. Relays of different orders do not work at the
    same time: the first is at work, the others stand by.
    """

    def __init__(self, outbox: Outbox, lease: timedelta, ordering: Ordering) -> None:
        self._queries = outbox._queries
        self._lease = lease
        self._ordering = ordering
        self.owner = uuid4()
        """The name of this incarnation."""
        self.is_active = False
        """Whether it is at work; False while it stands by."""

    async def register(self, connection: Connection) -> None:
        """Enters this relay among the living, at work unless relays of another order are."""
        queries = self._queries
        await connection.execute(queries.lock_ordering)
        self.is_active = await connection.fetchval(queries.register, self.owner, self._lease, self._ordering)
        await self._begin(connection, may_work=self.is_active)

    async def activate(self, connection: Connection) -> bool:
        """Goes to work if no relay of another order is left, with the commit of this: then set `is_active`."""
        await connection.execute(self._queries.lock_ordering)
        may_work = bool(await connection.fetchval(self._queries.activate, self.owner, self._ordering))
        await self._begin(connection, may_work=may_work)
        return may_work

    async def _begin(self, connection: Connection, *, may_work: bool) -> None:
        if may_work and self._ordering == "none":
            await connection.execute(self._queries.free_lanes)

    async def renew(self, connection: Connection) -> bool:
        """Renews the lease; False when this relay was declared dead and what it held was taken over."""
        return bool(await connection.fetchval(self._queries.renew, self.owner, self._lease))

    def rename(self) -> None:
        """Takes a new name, after the old one was declared dead."""
        self.owner = uuid4()

    async def lock(self, connection: Connection) -> None:
        """Waits for a transaction of this relay that may still be committing on a connection given up long ago."""
        await connection.execute(self._queries.lock_relay, self.owner)

    async def wait_for_own(self, connection: Connection) -> None:
        """Waits like `lock`, and lets go again at once: what follows may take long, and must not hold up the lease."""
        await connection.execute(self._queries.wait_for_own.format(self.owner))

    async def leave(self, connection: Connection) -> None:
        """Leaves the living, unless something is still held in this name: then others take it over."""
        await connection.execute(self._queries.unregister, self.owner)

    async def take_over(self, connection: Connection, *, orphans: bool = False) -> TakenOver:
        """Declares relays dead and takes over what they held.

        Args:
            connection: With a transaction open.
            orphans: Also look for what is held by relays that nobody has heard of.
        """
        queries = self._queries
        dead = {row["owner"]: row["ordering"] for row in await connection.fetch(queries.bury_relays, self.owner)}
        if orphans:
            unknown = await connection.fetch(queries.orphans)
            dead |= {row["owner"]: "none" for row in unknown if row["owner"] not in dead}
        messages = 0
        for ordering in sorted(set(dead.values())):
            messages += await self._take_over(connection, [who for who in dead if dead[who] == ordering], ordering)
        left: timedelta | None = await connection.fetchval(queries.next_death, self.owner)
        return TakenOver(len(dead), messages, None if left is None else left + _MARGIN)

    async def _take_over(self, connection: Connection, owners: list[UUID], ordering: Ordering) -> int:
        queries = self._queries
        if ordering == "none":
            statuses = [await connection.execute(queries.take_over_claims, owners)]
        else:
            statuses = [await connection.execute(queries.suspect_in_slots, owners, ordering == "total")]
            await connection.execute(queries.free_slots, owners)
            await connection.execute(queries.drop_all_claims, owners)
        statuses.append(await connection.execute(queries.take_over_waiting, owners))
        return sum(map(affected, statuses))
