"""What there is in the model of order="key": the tables, who writes, and what the relays remember; all of it values."""

from enum import Enum
from typing import Final, Literal, NamedTuple, TypeVar

T = TypeVar("T")

Place = Literal["free", "taken", "lost", "pending", "waiting", "behind", "dead", "parked", "gone"]
"""Of a position: not given out, in an open transaction, rolled back, in outbox, in outbox_waiting with a due time or
without one, in outbox_dead, there behind another, delivered and deleted."""

PREPARED: Final = 8
"""A prepared transaction holds its locks under another name: the writer's bit, moved so far to the left."""


class Flaw(Enum):
    """What a protocol may have wrong: each is a mechanism left out, or done in another order."""

    BARE_CURSOR = "reads whatever is visible beyond the cursor"
    XID_HORIZON = "reads what is older than every running transaction, and moves the cursor there"
    LOCKS_BEFORE_POSITION = "reads who holds the lock first, then the last position"
    PREPARED_IGNORED = "takes a transaction that prepares its commit for ended"
    UNFENCED_CLAIM = "claims fresh messages without a look at its own row"
    UNFENCED_TAKE = "claims waiting messages without a look at its own row"
    UNFENCED_SETTLE = "settles without a look at its own row and slots"
    GAIN_WITHOUT_BLOCKED = "takes over a slot, but not which lanes are blocked"
    GAIN_WITHOUT_REWIND = "takes over a slot and leaves the cursor where it is"
    GAIN_DURING_READ = "takes over a slot while a read is under way, which moves the cursor afterwards"
    NO_DRAINING = "gives a slot away while a delivery is under way"
    RELEASE_KEEPS = "gives a slot away, and keeps its waiting messages claimed"
    UNBLOCK_AFTER_HEAD = "unblocks a lane when its head is delivered"
    UNBLOCK_DURING_MOVE = "unblocks a lane while fresh messages are on their way behind"
    UNBLOCK_LATE = "unblocks a lane by what it read before a failure that it learns of meanwhile"
    MOVE_BEFORE_HEAD = "moves what it reads behind before the failure of the head is settled"
    BLOCK_AFTER_SETTLE = "blocks a lane when the failure is settled, not when it is known"
    LEAVES_FOLLOWERS = "postpones a head, and not what is in hand behind it"
    TAKE_BEFORE_SETTLED = "claims waiting messages of a lane while others of it are yet to be moved there"
    DUE_BY_TIME = "claims the waiting messages of a lane as they fall due, not as they are numbered"
    TAKE_WHILE_PARKED = "claims what was redriven before the rest of the parked lane waits again"
    TAKE_UNREAD = "claims waiting messages beyond what it has read"
    BURY_KEEPS_WAITING = "declares a relay dead, and leaves its waiting messages claimed"
    REREAD_AT_ONCE = "after an unanswered COMMIT does not wait for what may still be committing"
    REREAD_TABLES_ONLY = "after an unanswered COMMIT forgets the lanes blocked by what is yet to be settled"
    REREAD_BLOCKS = "after an unanswered COMMIT takes a lane for blocked of which all that waits is in hand"
    REREAD_KEEPS = "after an unanswered COMMIT keeps waiting messages claimed that it does not know to hold"
    REREAD_FOR_ANOTHER = "is declared dead while it rereads, and has the answer count for its new name"
    UNFENCED_REREAD = "claims what it has in hand once more without a look at its own row"
    SETTLE_WITHOUT_SLOTS = "settles without a look at anything when it knows of no slots"
    SETTLE_FORGOTTEN = (
        "settles what waits without claiming it once more, though the server may have forgotten that claim"
    )
    SETTLE_NOT_DURABLE = "settles failures without waiting until that would outlive a crash of the server"
    GAIN_NOT_DURABLE = "takes slots without waiting until that would outlive a crash of the server"
    RELEASE_NOT_DURABLE = "gives slots away without waiting until that would outlive a crash of the server"
    OTHERS_DO_NOT_BLOCK = "takes a lane for free of which all that waits is claimed, by whomever"


class Row(NamedTuple):
    place: Place
    holder: int = 0
    """The writer while it is taken; the name of the relay that claimed it while it waits; the head while parked."""
    attempts: int = 0


class Writer(NamedTuple):
    phase: Literal["before", "open", "prepared", "visible", "ended"] = "before"
    written: int = 0
    xid: int = 0


class Slot(NamedTuple):
    owner: int = 0
    epoch: int = 0
    suspect_upto: int = 0


class Lane(NamedTuple):
    """What a relay remembers of a slot; each has one lane."""

    epoch: int = 0
    """0 if it does not believe to own it."""
    queue: tuple[int, ...] = ()
    flight: tuple[int, ...] = ()
    """With the destination, or answered and not settled."""
    accepted: int = 0
    """How many of those the destination took."""
    failed: Literal["", "again", "given up"] = ""
    """What becomes of the one it refused after those."""
    followers: tuple[int, ...] = ()
    """What was queued behind that one; its settling moves them as well."""
    aside: tuple[int, ...] = ()
    """Fresh messages that are to go behind."""
    blocked: bool = False
    emptied: bool = False
    """It was read that nothing waits any more; known to a flawed protocol only, all others act on it in that step."""
    parked: int = 0
    """The dead letter that the others are parked behind."""
    draining: bool = False

    waited: tuple[int, ...] = ()
    """Those in hand that had been waiting, and are claimed in outbox_waiting; all others are fresh."""

    def in_hand(self) -> tuple[int, ...]:
        return self.queue + self.flight + self.followers + self.aside

    def with_what_is_in_hand(self) -> "Lane":
        """Forgets which of those had been waiting that are in hand no more."""
        if not self.waited:
            return self
        in_hand = self.in_hand()
        return self._replace(waited=tuple(position for position in self.waited if position in in_hand))


class Reader(NamedTuple):
    phase: Literal["idle", "last", "locks", "wait", "rows"] = "idle"
    last: int = 0
    writers: int = 0
    """Bits of those that are waited for."""
    rows: tuple[int, ...] = ()


class Relay(NamedTuple):
    name: int
    lanes: tuple[Lane, ...]
    reader: Reader = Reader()
    cursor: int = 0
    bound: int = 0
    adrift: bool = False
    """It does not know what became of its last COMMIT."""

    def in_hand(self) -> set[int]:
        return {position for lane in self.lanes for position in lane.in_hand()}


class Transaction(NamedTuple):
    """A relay's transaction that writes, when it commits."""

    kind: Literal["gain", "claim", "behind", "take", "settle", "release", "unpark"]
    name: int
    slot: int = 0
    epoch: int = 0
    rows: tuple[int, ...] = ()
    """What is claimed or delivered."""
    failed: int = 0
    again: bool = False
    followers: tuple[int, ...] = ()
    head: int = 0
    """What the followers are parked behind; 0 if they wait."""
    held: tuple[int, ...] = ()
    """What waits and is first taken in hand again, in case nobody has it."""


class Faults(NamedTuple):
    """How many there may be; in a state, how many are left."""

    expiries: int = 0
    """Leases that run out though the relay lives."""
    crashes: int = 0
    unanswered: int = 0
    """Commits."""
    failures: int = 0
    """Messages that the destination refuses."""
    handovers: int = 0
    rollbacks: int = 0
    server_crashes: int = 0
    redrives: int = 0


NO_FAULTS: Final = Faults()


class Database(NamedTuple):
    """What a crash of the server leaves."""

    rows: tuple[Row, ...]
    slots: tuple[Slot, ...]
    living: int
    claims: tuple[int, ...]


class State(NamedTuple):
    writers: tuple[Writer, ...]
    rows: tuple[Row, ...]
    slots: tuple[Slot, ...]
    relays: tuple[Relay, ...]
    left: Faults
    named: int
    """The last name that was taken."""
    living: int
    """Bits of the names in outbox_relays."""
    claims: tuple[int, ...] = ()
    """Bits of the positions that each name claimed; empty without suspects."""
    late: Transaction | None = None
    """One whose COMMIT was not answered, and which may commit yet."""
    delivered: int = 0
    """Bits of the positions that the destination has ever taken."""
    broken: str = ""
    """The promise that the last step broke."""

    saved: frozenset[Database] = frozenset()
    """What a crash of the server may go back to: all since the last durable commit; empty if it will not crash."""

    def database(self) -> Database:
        return Database(self.rows, self.slots, self.living, self.claims)

    def lives(self, name: int) -> bool:
        return bool(self.living >> name & 1)

    def is_committing(self, name: int) -> bool:
        """Whether a transaction of its still holds its row, so that nobody else can lock or delete it."""
        return self.late is not None and self.late.name == name

    def was_delivered(self, position: int) -> bool:
        return bool(self.delivered >> position & 1)

    def last_position(self) -> int:
        """The sequence's last value: it does not wait for a commit, and is not rolled back."""
        return sum(row.place != "free" for row in self.rows)

    def writing(self) -> int:
        """Who holds the lock, in bits."""
        bits = {"open": 1, "visible": 1, "prepared": 1 << PREPARED}
        return sum(bits.get(writer.phase, 0) << number for number, writer in enumerate(self.writers))

    def spend(self, fault: str) -> Faults:
        return self.left._replace(**{fault: getattr(self.left, fault) - 1})

    def with_relay(self, number: int, relay: Relay) -> "State":
        return self._replace(relays=put(self.relays, number, relay))

    def with_lane(self, number: int, slot: int, lane: Lane) -> "State":
        relay = self.relays[number]
        return self.with_relay(number, relay._replace(lanes=put(relay.lanes, slot, lane)))

    def with_claim(self, name: int, positions: tuple[int, ...], *, claimed: bool) -> "State":
        """Adds to what a relay claimed, or takes away from it; nobody asks without suspects."""
        if not self.claims:
            return self
        bits = sum(1 << position for position in positions)
        claims = self.claims[name] | bits if claimed else self.claims[name] & ~bits
        return self._replace(claims=put(self.claims, name, claims))


def put(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])


def waits(row: Row) -> bool:
    return row.place in {"waiting", "behind"}


def names_of(writers: int) -> str:
    names = ["A", "B", "A, prepared", "B, prepared"]
    bits = [0, 1, PREPARED, PREPARED + 1]
    return " and ".join(name for name, bit in zip(names, bits, strict=True) if writers >> bit & 1) or "nobody"


def listed(positions: tuple[int, ...]) -> str:
    return " ".join(map(str, positions)) or "nothing"
