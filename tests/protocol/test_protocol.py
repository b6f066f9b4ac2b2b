"""Every interleaving of the protocol of order="key" in small worlds keeps its promises, and with any part wrong, not.

What is in the model and what is not is told in `model.py`. `python -m tests.protocol` goes through larger worlds.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.protocol.explorer import Report, Step, explore
from tests.protocol.model import Protocol
from tests.protocol.world import Faults, Flaw, Row, State, waits
from tests.protocol.worlds import FLAWED, HARMLESS, SMALL, THREE, TWO_AND_ONE

# --- the protocol -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", SMALL.values(), ids=SMALL.keys())
def test_whatever_happens_in_whatever_order_every_promise_is_kept(protocol: Protocol) -> None:
    report = protocol.check()
    print(report)
    assert report.counterexample is None, str(report)


def _names(protocol: Protocol) -> str:
    return " and ".join(flaw.name for flaw in protocol.flaws)


@pytest.mark.parametrize(("broken", "protocol"), FLAWED, ids=[f"{_names(p)}: {b}" for b, p in FLAWED])
def test_a_protocol_with_a_flaw_breaks_a_promise(broken: str, protocol: Protocol) -> None:
    report = protocol.check()
    print(report)
    assert report.counterexample is not None, f"not refuted: {protocol.flaws}"
    assert report.counterexample.broken == broken


def test_every_flaw_is_tried() -> None:
    protocols = [protocol for _, protocol in FLAWED] + HARMLESS
    assert {flaw for protocol in protocols for flaw in protocol.flaws} == set(Flaw)


@pytest.mark.parametrize("protocol", HARMLESS, ids=map(_names, HARMLESS))
def test_a_flaw_that_something_else_catches_does_no_harm_by_itself(protocol: Protocol) -> None:
    report = protocol.check()
    assert report.counterexample is None, str(report)


_SOUND = dict.fromkeys(replace(protocol, flaws=()) for _, protocol in FLAWED)
_TRIED = [*SMALL.values(), *(replace(protocol, flaws=()) for protocol in HARMLESS)]


@pytest.mark.parametrize("protocol", [protocol for protocol in _SOUND if protocol not in _TRIED])
def test_without_the_flaw_the_same_world_keeps_its_promises(protocol: Protocol) -> None:
    assert protocol.check().counterexample is None


def test_no_fence_can_keep_a_relay_that_slept_from_delivering_what_its_heir_has_given_up() -> None:
    report = Protocol(Faults(expiries=1, failures=1), tries=1, prompt=True, strict=True).check()
    assert report.counterexample is not None
    assert report.counterexample.broken == "out of order"
    given_up = report.counterexample.state.rows[0]
    assert given_up.place == "dead"
    assert report.counterexample.trace[-1] == "relay 1 delivers 1"


# --- that the worlds are not too small to show anything ---------------------------------------------------


def _is_late(state: State) -> bool:
    return state.rows[0].place == "taken" and state.rows[1].place == "pending"


def _both_deliver(state: State) -> bool:
    return all(any(lane.flight for lane in relay.lanes) for relay in state.relays)


def _two_wait_with_their_owner_frozen(state: State) -> bool:
    return sum(waits(row) for row in state.rows) == 2 and not state.living >> 1 & 1 and state.relays[0].name == 1


def _unblocked_with_followers_in_hand(state: State) -> bool:
    lane = state.relays[0].lanes[0]
    return not lane.blocked and bool(lane.queue) and any(row.place == "behind" for row in state.rows)


def _waits_for_anybody_and_is_delivered(state: State) -> bool:
    lane = state.relays[0].lanes[0]
    return any(state.rows[n - 1] == Row("waiting", 0, 1) for n in lane.flight) and lane.accepted > 0


@pytest.mark.parametrize(
    ("faults", "happens"),
    [
        (Faults(), _is_late),
        (Faults(expiries=1), _both_deliver),
        (Faults(expiries=1, failures=1), _two_wait_with_their_owner_frozen),
        (Faults(failures=1), _unblocked_with_followers_in_hand),
        (Faults(failures=2), lambda state: any(row.place == "dead" for row in state.rows)),
        (Faults(handovers=1), lambda state: bool(state.relays[1].lanes[0].flight)),
        (Faults(unanswered=1), lambda state: state.late is not None and state.late.kind == "settle"),
        (Faults(server_crashes=1, failures=1), _waits_for_anybody_and_is_delivered),
    ],
)
def test_the_worlds_have_the_hard_cases_in_them(faults: Faults, happens: Callable[[State], bool]) -> None:
    protocol = Protocol(faults, keys=THREE, writers=TWO_AND_ONE, limit=1)

    def met(state: State) -> str:
        return "met" if happens(state) else ""

    report = explore(protocol.start(), protocol.steps, broken=met, is_end=protocol.is_end)
    assert report.counterexample is not None
    assert report.counterexample.broken == "met"


# --- the explorer -----------------------------------------------------------------------------------------


def _explore(graph: dict[int, list[int]], *, bad: int | None = None, end: int = 9) -> Report[int]:
    """Explores a graph whose negative steps are faults."""

    def steps(state: int) -> list[Step[int]]:
        return [Step(f"to {abs(there)}", abs(there), is_fault=there < 0) for there in graph.get(state, [])]

    return explore(0, steps, broken=lambda state: "bad" if state == bad else "", is_end=lambda state: state == end)


def test_the_shortest_way_to_a_broken_promise_is_found() -> None:
    found = _explore({0: [1, 4], 1: [2], 2: [3], 3: [9], 4: [3]}, bad=3).counterexample
    assert found is not None
    assert found.trace == ["to 4", "to 3"]
    assert str(found).startswith("bad, after 2 steps:\n  1. to 4\n  2. to 3\n")


def test_a_state_that_comes_to_no_end_is_found() -> None:
    found = _explore({0: [1, 2], 1: [9]}).counterexample
    assert found is not None
    assert (found.broken, found.trace) == ("nothing goes on", ["to 2"])


def test_a_circle_without_a_way_out_is_found() -> None:
    found = _explore({0: [1, 2], 1: [9], 2: [3], 3: [2]}).counterexample
    assert found is not None
    assert (found.broken, found.trace) == ("no end in sight", ["to 2"])


def test_a_circle_with_a_way_out_is_fine_and_everything_is_visited_once() -> None:
    report = _explore({0: [1], 1: [0, 2], 2: [9, 1]})
    assert report.counterexample is None
    assert (report.states, report.steps) == (4, 5)


def test_a_fault_is_no_way_out() -> None:
    found = _explore({0: [9, 1], 1: [-9]}).counterexample
    assert found is not None
    assert (found.broken, found.trace) == ("nothing goes on", ["to 1"])


def test_a_world_that_is_too_large_is_given_up() -> None:
    with pytest.raises(RuntimeError, match="More than 10 states"):
        explore(
            0, lambda state: [Step("on", state + 1)], broken=lambda _: "", is_end=lambda state: state == 9, limit=10
        )
