"""Rounds: in each cell every side takes its turn, again and again (A B C A B C); and the state of sides in between."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from benchmarks._figures import Figures, Name, is_peer
from benchmarks._pgbench import PgBench
from benchmarks._sides import MissingError, Running, SideError, Turn, database

AnySide = Running | PgBench
SIZE: Final = 300
"""Bytes of a body, where nothing else is said."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    name: str
    rounds: int
    drain: float
    """Seconds of one drain."""
    seconds: float
    """Of writing and latency, in proportion."""
    backlog: int
    dead: int
    """Rows that are dead and cannot be vacuumed, to drain beside."""
    deep: int = 0
    """A backlog as large as that is compared with one of 200,000; 0 leaves it out."""
    steady: float = 0.0
    """Seconds of steady traffic; 0 leaves it out."""
    every: bool = False
    """Every size, number of connections, and variant of the peers; or those that tell most."""


FULL: Final = Plan(
    "full", 5, drain=0.9, seconds=0.6, backlog=200_000, dead=600_000, deep=1_000_000, steady=120, every=True
)
SHORT: Final = Plan("short", 3, drain=0.6, seconds=0.4, backlog=100_000, dead=100_000)

Peers = Literal["none", "fastest", "others"]
_RANKED: Final = ("best", "fast", "default")

Measure = Callable[[AnySide, str], Awaitable[Mapping[str, float]]]
"""Lets a side have its turn with a variant; returns the figure of each work that was measured in it."""

Who = tuple[str, str]
"""A side and its variant."""


@dataclass(frozen=True)
class Cell:
    """Works of one kind that are measured together."""

    group: str
    works: Mapping[str, str]
    """What is measured in one turn, each with its unit."""
    turns: Sequence[Who]
    measure: Measure
    rounds: int | None = None
    """Other than the plan's."""


@dataclass
class Backlog:
    """What is in a side's tables."""

    wanted: int
    keys: int
    variant: str
    """Whose turn was the last."""
    pending: int
    kept: bool = False


class Rounds:
    """Measures cells.

    Args:
        plan: How much.
        server: The DSN of the server.
        sides: Who takes part.
        say: Told of progress, and of what fails.
    """

    def __init__(self, plan: Plan, server: str, sides: Mapping[str, AnySide], say: Callable[[str], None]) -> None:
        self.plan = plan
        self.figures = Figures()
        self.seconds, self.drain = plan.seconds, plan.drain
        self._server = server
        self._sides = dict(sides)
        self._say = say
        self._backlogs: dict[str, Backlog] = {}
        self._elsewhere: dict[str, Running] = {}
        self._siblings: dict[str, list[Running]] = {}

    async def measure(self, cell: Cell) -> None:
        """Measures one, and leaves out whoever fails in it."""
        turns = [turn for turn in cell.turns if turn[0] in self._sides]
        for _ in range(cell.rounds or self.plan.rounds):
            for turn in tuple(turns):
                try:
                    measured = await cell.measure(self._sides[turn[0]], turn[1])
                except SideError as error:
                    turns.remove(turn)
                    await self._left_out(cell, turn, error)
                    continue
                for work, figure in measured.items():
                    self.figures.add(Name(cell.group, work, *turn), cell.works[work], figure)

    async def stop(self) -> None:
        """Ends all processes of all sides."""
        siblings = [side for sides in self._siblings.values() for side in sides]
        for side in [*self._sides.values(), *self._elsewhere.values(), *siblings]:
            await side.stop()

    async def _left_out(self, cell: Cell, turn: Who, error: SideError) -> None:
        if not isinstance(error, MissingError):
            self._say(f"{cell.group}, {next(iter(cell.works))}: {error}")
        for work in cell.works:
            self.figures.miss(Name(cell.group, work, *turn), str(error))
        side = self._sides[turn[0]]
        self._backlogs.pop(side.dsn, None)
        if isinstance(side, Running) and not side.alive:
            self._sides[turn[0]] = await side.sibling()

    # --- who takes turns ----------------------------------------------------------------------------------

    def turns(self, *ours: str, by_hand: Sequence[str] = (), peers: Peers = "none", waking: bool = False) -> list[Who]:
        """Returns these variants of ours and by hand; and peers, at their fastest or with all else that they may set.

        Some of a peer's settings are for waking its relay, and have no part in anything else.
        """
        turns = [("ours", variant) for variant in ours] + [("by_hand", variant) for variant in by_hand]
        for key, side in self._sides.items() if peers != "none" else ():
            if is_peer(key):
                ranked = [name for name in _RANKED if name in side.settings]
                others = [name for name in side.settings if name not in ranked] if waking else []
                turns += [(key, name) for name in (ranked[1:] if peers == "others" else ranked[:1]) + others]
        return turns

    # --- the state of a side ------------------------------------------------------------------------------

    async def filled(self, side: AnySide, variant: str, wanted: int, *, keys: int = 0, least: float = 0.5) -> int:
        """Fills the backlog again when less than this share of it is left, or it is not as another turn left it.

        What a variant settles and keeps is a part of its work, and would be in the way of another one.

        Returns:
            How many are pending now.
        """
        backlog = self._backlogs.get(side.dsn)
        if (
            backlog is None
            or (backlog.keys, backlog.wanted) != (keys, wanted)
            or backlog.pending < least * wanted
            or (backlog.kept and backlog.variant != variant)
        ):
            await side.ask("fill", messages=wanted, keys=keys, size=SIZE)
            backlog = Backlog(wanted, keys, variant, wanted)
        backlog.variant = variant
        self._backlogs[side.dsn] = backlog
        return backlog.pending

    async def emptied(self, side: AnySide) -> None:
        """Leaves no message pending."""
        self._backlogs.pop(side.dsn, None)
        await side.ask("fill", messages=0, keys=0, size=SIZE)

    async def accounted(self, side: AnySide, *turns: Turn) -> int:
        """Compares what was delivered with the rows that are left, and returns how many those are.

        Raises:
            SideError: When a message was lost, or delivered and not settled.
        """
        rows: dict[str, int] = (await side.ask("rows")).answer
        backlog = self._backlogs[side.dsn]
        delivered, gone = sum(turn.count for turn in turns), backlog.pending - rows["pending"]
        backlog.pending, backlog.kept = rows["pending"], bool(rows["settled"])
        if delivered != gone:
            raise SideError(f"{side.name} delivered {delivered:,} messages, and {gone:,} rows are gone")
        return backlog.pending

    async def drained(self, side: AnySide, variant: str, messages: int, **load: Any) -> Turn:
        """Has a side drain so many, for no longer than a turn takes, and accounts for them."""
        turn = await side.ask("drain", **{"seconds": self.drain, **load}, messages=messages, variant=variant)
        await self.accounted(side, turn)
        return turn

    async def siblings(self, side: AnySide, count: int) -> list[AnySide]:
        """Returns the side and further processes of it on the same database, so many in all."""
        started = self._siblings[side.key] = [other for other in self._siblings.get(side.key, []) if other.alive]
        while isinstance(side, Running) and len(started) < count - 1:
            started.append(await side.sibling())
        return [side, *started[: count - 1]]

    async def elsewhere(self, side: AnySide) -> AnySide:
        """Returns another process of the side, with a second database."""
        if not isinstance(side, Running):
            return side
        other = self._elsewhere.get(side.key)
        if other is None:
            other = await Running.start(side.key, await database(self._server, f"{side.key}_2"))
            await other.ask("prepare")
        elif not other.alive:
            other = await other.sibling()
        self._elsewhere[side.key] = other
        return other
