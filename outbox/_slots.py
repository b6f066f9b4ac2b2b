"""Which slots a relay owns, and which share of them is its own."""

from collections.abc import Iterable
from typing import Final, NamedTuple
from uuid import UUID

from outbox._message import Message
from outbox._outbox import Connection, position_of
from outbox._queries import SLOTS, LaneQueries

_MOST: Final = SLOTS["key"]
_BITS: Final = 64


class Share(NamedTuple):
    """What there is to be shared out."""

    too_many: int
    """How many slots this relay has that are others'."""
    too_few: int
    """How many more it may take, if they are free."""


class Slots:
    """The slots of one relay, each with its epoch; of those that are leaving it reads and delivers nothing more."""

    def __init__(self, queries: LaneQueries, count: int) -> None:
        self._queries = queries
        self._count = count
        self.owned: dict[int, int] = {}
        self.leaving: set[int] = set()

    @property
    def at_work(self) -> set[int]:
        """Those that are read."""
        return self.owned.keys() - self.leaving

    @property
    def epochs(self) -> list[int]:
        """Slot and epoch of each, both in one number."""
        return [_MOST * epoch + slot for slot, epoch in self.owned.items()]

    @property
    def is_one(self) -> bool:
        """Whether there is only one, for all messages."""
        return self._count == 1

    def of(self, message: Message) -> int:
        """Returns the slot of a message: its lane's or, if it has none, by its position."""
        return self.of_lane(position_of(message) if message._lane is None else message._lane)

    def of_lane(self, lane: int) -> int:
        """Returns the slot of a lane."""
        return lane & (self._count - 1)

    async def share(self, connection: Connection, owner: UUID) -> Share:
        """Looks at who lives and who owns what.

        Shares differ by one slot at most. Somebody who has less than the smallest gets what others have beyond it.
        """
        others = {row["owner"]: 0 for row in await connection.fetch(self._queries.living, owner)}
        free = mine = 0
        for row in await connection.fetch(self._queries.slots):
            free += row["owner"] is None
            mine += row["owner"] == owner
            if row["owner"] in others:
                others[row["owner"]] += 1
        fewest, rest = divmod(self._count, len(others) + 1)
        most = fewest + (rest > 0)
        wanted = sum(max(0, fewest - count) for count in others.values()) - free
        return Share(max(0, mine - most, min(mine - fewest, wanted)), min(free, max(0, most - mine)))

    def give_up(self, count: int) -> None:
        """Has so many slots leave, those that do already among them."""
        staying = sorted(self.at_work)
        self.leaving |= set(staying[len(staying) - max(0, count - len(self.leaving)) :])

    def forget(self, slots: Iterable[int]) -> None:
        """Owns these no longer."""
        for slot in slots:
            self.owned.pop(slot, None)
            self.leaving.discard(slot)

    async def reread(self, connection: Connection, owner: UUID) -> None:
        """Asks the table what this relay owns."""
        rows = await connection.fetch(self._queries.slots)
        self.owned = {row["slot"]: row["epoch"] for row in rows if row["owner"] == owner}
        self.leaving &= self.owned.keys()


def mask_of(slots: Iterable[int]) -> int:
    """Returns a bigint with a bit for each slot."""
    mask = sum(1 << slot for slot in slots)
    return mask - (1 << _BITS) if mask >> (_BITS - 1) else mask
