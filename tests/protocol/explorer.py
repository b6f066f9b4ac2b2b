"""Goes through every interleaving of a small state machine, breadth first: the first counterexample is a shortest."""

import time
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

S = TypeVar("S", bound=Hashable)


class Step(NamedTuple, Generic[S]):
    """One thing that may happen next."""

    what: str
    state: S
    is_fault: bool = False
    """Nobody may count on it: a crash, a lease that runs out, a destination that fails."""


@dataclass(frozen=True, slots=True)
class Counterexample(Generic[S]):
    """The shortest way to a broken promise."""

    broken: str
    trace: list[str]
    state: S

    def __str__(self) -> str:
        steps = (f"{number:3}. {what}" for number, what in enumerate(self.trace, 1))
        return "\n".join([f"{self.broken}, after {len(self.trace)} steps:", *steps, f"     {self.state}"])


@dataclass(frozen=True, slots=True)
class Report(Generic[S]):
    """What was found, and how large the world was."""

    states: int
    steps: int
    seconds: float
    counterexample: Counterexample[S] | None

    def __str__(self) -> str:
        found = self.counterexample or "every promise is kept"
        return f"{self.states:,} states, {self.steps:,} steps, {self.seconds:.1f} s: {found}"


def explore(
    start: S,
    steps: Callable[[S], Iterable[Step[S]]],
    *,
    broken: Callable[[S], str],
    is_end: Callable[[S], bool],
    limit: int = 10_000_000,
) -> Report[S]:
    """Visits every state that can be reached.

    Args:
        start: Where everything begins.
        steps: What may happen in a state, one after another.
        broken: Names the promise that a state breaks, or nothing.
        is_end: Whether all is done. From every state such an end must be within reach without any further fault: a
            state without a next step has to be one, and no circle may be a trap.
        limit: States after which it gives up with an error; the scope is too large.
    """
    return _Search(start, steps, limit).run(broken, is_end)


class _Search(Generic[S]):
    def __init__(self, start: S, steps: Callable[[S], Iterable[Step[S]]], limit: int) -> None:
        self._steps, self._limit = steps, limit
        self._number: dict[S, int] = {start: 0}
        self._states = [start]
        self._before = array("l", [0])
        self._how = ["start"]
        self._from, self._to = array("l"), array("l")
        """The steps that are no faults."""
        self._taken = 0

    def run(self, broken: Callable[[S], str], is_end: Callable[[S], bool]) -> Report[S]:
        began = time.perf_counter()
        found = self._look_for(broken) or self._look_for_a_trap(is_end)
        return Report(len(self._states), self._taken, time.perf_counter() - began, found)

    def _look_for(self, broken: Callable[[S], str]) -> Counterexample[S] | None:
        # The list grows while it is gone through.
        for here, state in enumerate(self._states):
            if what := broken(state):
                return self._counterexample(what, here)
            for step in self._steps(state):
                self._taken += 1
                there = self._visit(here, step)
                if not step.is_fault:
                    self._from.append(here)
                    self._to.append(there)
        return None

    def _visit(self, here: int, step: Step[S]) -> int:
        there = self._number.setdefault(step.state, len(self._states))
        if there == len(self._states):
            if there >= self._limit:
                raise RuntimeError(f"More than {self._limit} states; take a smaller scope")
            self._states.append(step.state)
            self._before.append(here)
            self._how.append(step.what)
        return there

    def _look_for_a_trap(self, is_end: Callable[[S], bool]) -> Counterexample[S] | None:
        """Goes backwards from the ends; whatever is not met on the way will never come to one."""
        hopeful = bytearray(map(is_end, self._states))
        arrivals = self._arrivals()
        found = [number for number, good in enumerate(hopeful) if good]
        while found:
            for before in arrivals(found.pop()):
                if not hopeful[before]:
                    hopeful[before] = 1
                    found.append(before)
        if all(hopeful):
            return None
        # One that has come to a standstill says more than one that is doomed.
        moving = set(self._from)
        doomed = [number for number, good in enumerate(hopeful) if not good]
        for number in doomed:
            if number not in moving:
                return self._counterexample("nothing goes on", number)
        return self._counterexample("no end in sight", doomed[0])

    def _arrivals(self) -> Callable[[int], Iterator[int]]:
        """Returns from where a state is reached in one step, as a linked list in three arrays."""
        last, earlier = array("l", [-1]) * len(self._states), array("l", bytes(len(self._to) * self._to.itemsize))
        for step, there in enumerate(self._to):
            earlier[step], last[there] = last[there], step

        def arrivals(there: int) -> Iterator[int]:
            step = last[there]
            while step >= 0:
                yield self._from[step]
                step = earlier[step]

        return arrivals

    def _counterexample(self, broken: str, here: int) -> Counterexample[S]:
        trace, number = list[str](), here
        while number:
            trace.append(self._how[number])
            number = self._before[number]
        return Counterexample(broken, trace[::-1], self._states[here])
