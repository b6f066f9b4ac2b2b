"""The horizon against simulated writers: it stays below whoever may still commit, and rises when nobody does."""

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from outbox._horizon import LOWEST, Horizon  # noqa: TID251 -- pure, and what every order hangs on: tested by itself

pytestmark = pytest.mark.timeout(60)

_SETTINGS = settings(max_examples=200, stateful_step_count=50, derandomize=True, deadline=None, phases=[Phase.generate])
_PATIENCE = 10.0
_WHICH = st.integers(0, 5)


@dataclass(eq=False)
class _Writer:
    """A transaction: it holds the lock from before its first position until after its commit is visible."""

    name: str
    positions: list[int] = field(default_factory=list)
    is_prepared: bool = False
    is_passed_over: bool = False
    has_ended: bool = False


@dataclass(frozen=True)
class _Look:
    """What was read of the last position, and then of the writers: first the regular ones, then the prepared."""

    last: int
    regular: dict[str, int | None] | None = None


class _Machine(RuleBasedStateMachine):
    """Reads as a relay does: beyond its cursor and up to the bound, from the beginning when somebody late has ended."""

    steps: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.horizon = Horizon(_PATIENCE)
        self.now = 1_000.0
        self.last = self.names = 0
        self.writers: list[_Writer] = []
        """Those that hold the lock."""
        self.look: _Look | None = None
        self.visible: set[int] = set()
        self.read: set[int] = set()
        self.cursor = LOWEST
        self.excused: set[int] = set()
        """Positions of those that were passed over."""

    # --- the writers

    @rule(count=st.integers(0, 2))
    def begin(self, count: int) -> None:
        self.names += 1
        self.writers.append(_Writer(f"{self.names % 3}/{self.names}"))
        for _ in range(count):
            self._take_a_position(self.writers[-1])

    @precondition(lambda self: self.at_work())
    @rule(which=_WHICH)
    def take_a_position(self, which: int) -> None:
        self._take_a_position(self._one(self.at_work(), which))

    def _take_a_position(self, writer: _Writer) -> None:
        self.last += 1
        writer.positions.append(self.last)

    @precondition(lambda self: any(not writer.has_ended for writer in self.writers))
    @rule(which=_WHICH, regret=st.booleans())
    def end(self, which: int, *, regret: bool) -> None:
        """The lock is still held."""
        writer = self._one([one for one in self.writers if not one.has_ended], which)
        writer.has_ended = True
        if not regret:
            self.visible |= set(writer.positions)

    @precondition(lambda self: any(writer.has_ended for writer in self.writers))
    @rule(which=_WHICH)
    def let_go(self, which: int) -> None:
        self.writers.remove(self._one([one for one in self.writers if one.has_ended], which))

    @precondition(lambda self: self.writers)
    @rule(which=_WHICH, regret=st.booleans())
    def end_at_once(self, which: int, *, regret: bool) -> None:
        writer = self.writers.pop(which % len(self.writers))
        if not writer.has_ended and not regret:
            self.visible |= set(writer.positions)

    @precondition(lambda self: self.at_work())
    @rule(which=_WHICH, renamed=st.booleans())
    def prepare(self, which: int, *, renamed: bool) -> None:
        """It has no pid any more. The first releases of PostgreSQL 14 give its locks another name, too."""
        writer = self._one(self.at_work(), which)
        writer.is_prepared = True
        if renamed and not writer.is_passed_over:  # else somebody might go back too early, but for its next round
            self.names += 1
            writer.name = f"-1/{self.names}"
        self.steps["prepared when passed over" if writer.is_passed_over else "prepared"] += 1

    def at_work(self) -> list[_Writer]:
        return [writer for writer in self.writers if not writer.is_prepared and not writer.has_ended]

    def _one(self, writers: list[_Writer], which: int) -> _Writer:
        return writers[which % len(writers)]

    # --- the relay

    @rule(seconds=st.sampled_from([0.1, 0.1, 2.0, _PATIENCE]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.look_at_once()

    @rule()
    def go_on_looking(self) -> None:
        """Each look is three: between them the writers go on."""
        if self.look is None:
            self.look = _Look(self.last)
        elif self.look.regular is None:
            self.look = _Look(self.look.last, {one.name: 1 for one in self.writers if not one.is_prepared})
        else:
            prepared: dict[str, int | None] = {one.name: None for one in self.writers if one.is_prepared}
            self._observe(self.look.last, {**self.look.regular, **prepared})
            self.look = None

    @rule()
    def look_at_once(self) -> None:
        self.look = None
        self._observe(self.last, {one.name: None if one.is_prepared else 1 for one in self.writers})

    def _observe(self, last: int, writers: dict[str, int | None]) -> None:
        before = self.horizon.bound
        if self.horizon.observe(last, writers, self.now):
            self.cursor = LOWEST
            self.steps["went back"] += 1
        if late := self.horizon.late(self.now):
            self.steps["passed over" if late.passed_over else "warned"] += 1
            assert late.writers
            assert late.waited >= (_PATIENCE if late.passed_over else 1.0)
            if late.passed_over:
                self._excuse(set(late.writers))
        assert self.horizon.bound >= before
        self.steps["rose"] += self.horizon.bound > before

    def _excuse(self, names: set[str]) -> None:
        for writer in self.writers:
            if writer.name in names:
                writer.is_passed_over = True
        self.excused |= {one for writer in self.writers if writer.is_passed_over for one in writer.positions}

    @rule()
    def read_on(self) -> None:
        """What is read out of order must be of those that were passed over."""
        found = {one for one in self.visible if self.cursor < one <= self.horizon.bound} - self.read
        for position in found:
            assert position in self.excused or position > max(self.read - self.excused, default=0)
        self.read |= found
        self.cursor = max(self.cursor, self.horizon.bound)

    def teardown(self) -> None:
        """When nobody writes any more the bound reaches the last position, and everything has been read."""
        while self.writers:
            self.end_at_once(0, regret=False)
        self.look_at_once()
        self.look_at_once()
        assert self.horizon.bound == self.last
        self.read_on()
        assert self.read == self.visible, "something was never read"

    # --- what must be, after each step

    @invariant()
    def nobody_who_may_still_commit_is_below_the_bound(self) -> None:
        for writer in self.writers:
            if not writer.has_ended and not writer.is_passed_over:
                assert all(position > self.horizon.bound for position in writer.positions)


@pytest.mark.filterwarnings("default::hypothesis.errors.NonInteractiveExampleWarning")
def test_the_horizon_never_passes_one_who_may_still_commit_and_nothing_is_missed() -> None:
    run_state_machine_as_test(_Machine, settings=_SETTINGS)
    print(dict(_Machine.steps))
    assert {"prepared", "warned", "passed over", "went back", "rose"} <= set(_Machine.steps)
