"""Lanes against lists: each is first in, first out and in one delivery at a time; nothing is lost or doubled."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import ClassVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from outbox import Message
from outbox._lanes import Lanes  # noqa: TID251 -- pure, and what every order hangs on: tested by itself

pytestmark = pytest.mark.timeout(60)

_SETTINGS = settings(max_examples=100, stateful_step_count=40, derandomize=True, deadline=None, phases=[Phase.generate])
_LANES = st.sampled_from([None, None, 1, 2, 3, 4])
_WHICH = st.integers(0, 5)

Lane = int | None


def _message(position: int, lane: Lane, body: bytes) -> Message:
    message = Message(None, topic="t")
    message._position, message._lane, message._body = position, lane, body  # noqa: SLF001 -- as it comes from a table
    return message


class _Machine(RuleBasedStateMachine):
    """The model knows by position: what is queued in which order, what is with the destination, what is answered."""

    steps: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.lanes = Lanes(1)
        self.position = 0
        self.lane_of: dict[int, Lane] = {}
        self.size_of: dict[int, int] = {}
        self.queues: dict[Lane, list[int]] = {}
        self.loose: set[int] = set()
        """Pulled out of their queues, or never queued: in hand, and about to be settled."""
        self.answered: set[int] = set()
        self.batches: list[tuple[list[int], Sequence[Lane]]] = []
        self.waiting: dict[int, bool] = {}
        """Those that had been waiting, and whether they go alone."""
        self.readings: dict[int, set[int]] = {}
        """The fresh messages of each reading that have no answer yet."""
        self.reading_sizes: dict[int, int] = {}
        self.ready_since: dict[Lane, int] = {}
        self.clock = 0

    # --- what comes in

    @rule(
        lanes=st.lists(_LANES, min_size=1, max_size=8),
        times=st.sampled_from([1, 1, 20]),
        fall_in=_WHICH,
        size=st.integers(0, 3),
    )
    def read(self, lanes: list[Lane], times: int, fall_in: int, size: int) -> None:
        """Some are not queued, since their lane is blocked."""
        messages = [self._new(lane, size) for lane in lanes * times]
        positions = [message.position or 0 for message in messages]
        self.lanes.hold_fresh(messages)
        self.readings[positions[-1]] = set(positions)
        self.reading_sizes[positions[-1]] = size * len(messages)
        self.loose |= {one for one in positions if self.lane_of[one] == fall_in}
        self._queue([message for message in messages if message.position not in self.loose])

    @rule(lane=_LANES, alone=st.booleans(), size=st.integers(0, 3))
    def claim_one_that_waited(self, lane: Lane, *, alone: bool, size: int) -> None:
        message = self._new(lane, size)
        self.waiting[message.position or 0] = alone
        self.lanes.hold_waiting(message, alone=alone)
        self._queue([message])

    def _new(self, lane: Lane, size: int) -> Message:
        self.position += 1
        self.lane_of[self.position], self.size_of[self.position] = lane, size
        return _message(self.position, lane, b"x" * size)

    def _queue(self, messages: list[Message]) -> None:
        self.lanes.queue(messages)
        for message in messages:
            lane = message._lane  # noqa: SLF001 -- see above
            if lane not in self.queues and lane not in self._busy():
                self._is_ready(lane)
            self.queues.setdefault(lane, []).append(message.position or 0)

    def _is_ready(self, lane: Lane) -> None:
        self.clock += 1
        self.ready_since[lane] = self.clock

    def _busy(self) -> set[Lane]:
        return {lane for _, lanes in self.batches for lane in lanes}

    # --- what goes out

    @rule(size=st.sampled_from([1, 3, 5, 30]))
    def take(self, size: int) -> None:
        ready = {lane for lane in self.queues if lane is None or lane not in self._busy()}
        messages, lanes = self.lanes.take(size)
        positions = [message.position or 0 for message in messages]
        assert len(positions) <= size
        assert bool(positions) == bool(ready)
        taken = {self.lane_of[one] for one in positions}
        assert taken <= ready, "a lane was in two deliveries at once"
        assert sorted(lanes) == sorted(taken - {None}), "each of its lanes is busy with it, once"  # type: ignore[type-var]
        for lane in taken:
            mine = [one for one in positions if self.lane_of[one] == lane]
            assert mine == self.queues[lane][: len(mine)], "not first in, first out"
            self._take_from(lane, len(mine))
        if positions:
            self._check_the_batch(positions, taken, ready, size)
            self.batches.append((positions, lanes))

    def _check_the_batch(self, positions: list[int], taken: set[Lane], ready: set[Lane], size: int) -> None:
        alone = [one for one in positions if self.waiting.get(one)]
        assert not alone or len(positions) == 1, "one that goes alone had company"
        first = self.lane_of[positions[0]]
        assert all(self.ready_since[first] <= self.ready_since[lane] for lane in ready - {first}), "overtaken for ever"
        left = ready - taken | {None for _ in [0] if None in self.queues}
        if len(positions) < size and not alone:
            following = min(left, key=self._since, default=0)
            is_stopped = bool(left) and self.waiting.get(self.queues[following][0], False)
            assert not left or is_stopped, "there was room for more"
        self.steps["alone" if alone else "several lanes" if len(taken) > 1 else "one lane"] += 1
        if None in taken and None in self.queues:
            self._is_ready(None)

    def _since(self, lane: Lane) -> int:
        return self.ready_since[lane]

    def _take_from(self, lane: Lane, count: int) -> None:
        del self.queues[lane][:count]
        if not self.queues[lane]:
            del self.queues[lane]

    @precondition(lambda self: self.batches)
    @rule(which=_WHICH)
    def finish(self, which: int) -> None:
        """Those that failed are not told apart from those that were delivered: all are answered."""
        positions, lanes = self.batches.pop(which % len(self.batches))
        self._answer(positions)
        self.lanes.finish(lanes)
        for lane in lanes:
            if lane in self.queues:
                self._is_ready(lane)
        self.answered |= set(positions)

    def _answer(self, positions: Sequence[int]) -> None:
        for left in self.readings.values():
            left.difference_update(positions)
        finished = {upto for upto, left in self.readings.items() if not left}
        assert set(self.lanes.answer(positions)) == finished
        for upto in finished:
            del self.readings[upto]
            self.steps["a reading finished"] += 1

    @rule(lane=_LANES)
    def pull(self, lane: Lane) -> None:
        """Its head failed: those behind it fall in."""
        pulled = [message.position for message in self.lanes.pull(lane)]
        assert pulled == self.queues.pop(lane, [])
        self.loose |= {one for one in pulled if one is not None}
        self.steps["pulled"] += bool(pulled)

    @precondition(lambda self: self.loose)
    @rule(which=_WHICH)
    def answer_what_was_pulled(self, which: int) -> None:
        some = sorted(self.loose)[: which + 1]
        self._answer(some)
        self.loose -= set(some)
        self.answered |= set(some)

    @precondition(lambda self: self.loose)
    @rule(which=_WHICH)
    def queue_again_what_was_pulled(self, which: int) -> None:
        """As when a slot of several is handed over, of those that have no key."""
        lane = self.lane_of[sorted(self.loose)[which % len(self.loose)]]
        if lane not in self.queues:
            back = sorted(one for one in self.loose if self.lane_of[one] == lane)
            self.loose -= set(back)
            self._queue([self.lanes.held[one] for one in back])

    @precondition(lambda self: self.answered)
    @rule(which=_WHICH)
    def release(self, which: int) -> None:
        some = sorted(self.answered)[: which + 1]
        self.lanes.release(some)
        self.answered -= set(some)
        for position in some:
            del self.lane_of[position]
            self.waiting.pop(position, None)
            self.steps["released"] += 1

    @precondition(lambda self: self.position > 30)
    @rule()
    def clear(self) -> None:
        self.lanes.clear()
        self.__init__()  # type: ignore[misc]

    # --- what must be, after each step

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        everything: list[int] = [
            *chain.from_iterable(self.queues.values()),
            *chain.from_iterable(positions for positions, _ in self.batches),
            *self.loose,
            *self.answered,
        ]
        assert sorted(everything) == sorted(self.lane_of)
        assert sorted(everything) == sorted(self.lanes.held)
        assert all(message.position == position for position, message in self.lanes.held.items())

    @invariant()
    def the_books_are_right(self) -> None:
        lanes = self.lanes
        assert sorted(lanes.waiting) == sorted(self.waiting)
        assert {one.position for one in lanes.fresh()} == set(self.lane_of) - set(self.waiting)
        assert {upto: set(left) for upto, left in lanes.readings} == self.readings
        queued = {lane: [one.position for one in messages] for lane, messages in lanes.queued()}
        assert queued == self.queues
        assert all(lanes.is_alone(message) == self.waiting.get(one, False) for one, message in lanes.held.items())

    @invariant()
    def the_room_is_what_is_not_held(self) -> None:
        size = sum(self.reading_sizes[upto] for upto in self.readings) + sum(self.size_of[one] for one in self.waiting)
        held, behind = len(self.lane_of), sum(len(self.queues.get(lane, ())) for lane in self._busy())
        everything, for_waiting = self.lanes.room(), self.lanes.room_for_waiting()
        assert everything == (min(800 - held, 100), 16 * 1024 * 1024 - size)
        assert for_waiting == (100 - len(self.waiting), everything.bytes)
        counted = held - len(self.answered - self.waiting.keys())
        assert self.lanes.is_half_full == (held >= 800 or counted - behind > 100), "what is behind its own counts not"
        self.steps["half full"] += self.lanes.is_half_full
        self.steps["many behind their own"] += counted > 100 >= counted - behind
        self.steps["many answered"] += held > 100 >= counted


@pytest.mark.filterwarnings("default::hypothesis.errors.NonInteractiveExampleWarning")
def test_a_lane_is_first_in_first_out_and_in_one_delivery_at_a_time_whatever_happens() -> None:
    run_state_machine_as_test(_Machine, settings=_SETTINGS)
    print(dict(_Machine.steps))
    assert {"alone", "several lanes", "one lane", "pulled", "released", "a reading finished", "half full"} <= set(
        _Machine.steps
    )
