"""What was measured: figures by what was done, by whom, round by round; ratios of their medians."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Final, NamedTuple, Self

OURS: Final = "ours"
FLOORS: Final = ("by_hand", "pgbench")


class Name(NamedTuple):
    """Whose figure it is, and of what."""

    group: str
    work: str
    side: str
    variant: str


@dataclass
class Figure:
    """What one side got in one work, round by round."""

    unit: str
    rounds: list[float] = field(default_factory=list)
    missing: str = ""
    """Why there is none: what the package cannot do, or what failed."""

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return median(self.rounds)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How one figure is to another."""

    value: float
    """Of the medians."""
    lowest: float
    """Of the rounds, each with its neighbour."""
    highest: float


class Figures:
    """All of them, in the order in which they were measured."""

    def __init__(self) -> None:
        self._figures: dict[Name, Figure] = {}

    def add(self, name: Name, unit: str, value: float) -> None:
        """Adds one round."""
        self._figures.setdefault(name, Figure(unit)).rounds.append(value)

    def miss(self, name: Name, why: str) -> None:
        """Remembers why there is none; rounds before a failure do not count."""
        self._figures[name] = Figure("", missing=why)

    def get(self, name: Name) -> Figure | None:
        """Returns one that has rounds."""
        figure = self._figures.get(name)
        return figure if figure and figure.rounds else None

    def cell(self, name: Name) -> Figure | None:
        """Returns one that has rounds, or that is missing."""
        return self._figures.get(name)

    def of(self, group: str) -> Iterator[tuple[Name, Figure]]:
        """Goes through those of a group, those that are missing included."""
        return ((name, figure) for name, figure in self._figures.items() if name.group == group)

    def works(self, group: str) -> list[str]:
        """Returns the works of a group."""
        return list(dict.fromkeys(name.work for name, _ in self.of(group)))

    def ratio(self, ours: Name, other: Name) -> Ratio | None:
        """Returns how the first is to the second, or None when one of them was not measured."""
        first, second = self.get(ours), self.get(other)
        if first is None or second is None or not all([second.median, *second.rounds]):
            return None
        each = [a / b for a, b in zip(first.rounds, second.rounds, strict=False)]
        return Ratio(first.median / second.median, min(each), max(each))

    def best(self, group: str, work: str, of: Callable[[str], bool], *, least: bool = False) -> Name | None:
        """Returns the best of the sides that are asked for, at its best settings: the most, or the least."""
        names = [name for name, _ in self.of(group) if name.work == work and of(name.side) and self.get(name)]
        pick = min if least else max
        return pick(names, key=lambda name: self._figures[name].median, default=None)

    def to_json(self) -> list[dict[str, Any]]:
        """Returns all of it."""
        return [name._asdict() | asdict(figure) for name, figure in self._figures.items()]

    @classmethod
    def from_json(cls, records: Iterable[dict[str, Any]]) -> Self:
        """Reads what `to_json` returned."""
        figures = cls()
        for record in records:
            name = Name(*(record[part] for part in Name._fields))
            figures._figures[name] = Figure(record["unit"], record["rounds"], record["missing"])
        return figures


def is_peer(side: str) -> bool:
    """Says whether a side is another package."""
    return side != OURS and side not in FLOORS
