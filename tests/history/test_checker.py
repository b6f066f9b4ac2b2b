"""The checker passes good histories and fails each of those with a fault seeded into it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.history.checker import Committed, Delivery, History, Moment, Span, check


def delivery(position: int, relay: int = 1, *, at: float | None = None, answered: bool = True) -> Delivery:
    """The delivery of message m1, m2 … at its own second, unless told otherwise."""
    begun = float(position) if at is None else at
    return Delivery(f"m{position}", position, relay, begun, begun + 0.5 if answered else None)


def history_of(count: int, *, held: int = 2, lease: float = 2.0) -> History:
    """One relay delivers so many messages of two keys, one each second."""
    return History(
        lease=lease,
        held=held,
        unflushed=1.0,
        committed={f"m{one}": Committed(f"m{one}", one, f"k{one % 2}", commit=one) for one in range(1, count + 1)},
        deliveries=[delivery(one) for one in range(1, count + 1)],
    )


def test_a_history_without_a_fault_breaks_nothing() -> None:
    verdict = check(history_of(9))
    assert not verdict.violations(ordered=True)
    assert not verdict.explained
    assert not verdict.late


# --- each fault by itself -----------------------------------------------------------------------------------


def test_a_committed_message_that_nobody_delivered_is_lost() -> None:
    history = history_of(9)
    del history.deliveries[4]
    assert check(history).lost == ["m5"]


def test_a_dead_letter_is_not_lost_but_only_what_is_rejected_may_be_one() -> None:
    history = history_of(9)
    del history.deliveries[4]
    history.dead = ["m5"]
    assert check(history).buried == ["m5"]
    history.committed["m5"] = replace(history.committed["m5"], rejected=True)
    assert not check(history).violations(ordered=True)


def test_a_rejected_message_that_is_no_dead_letter_is_lost() -> None:
    history = history_of(9)
    del history.deliveries[4]
    history.committed["m5"] = replace(history.committed["m5"], rejected=True)
    assert check(history).lost == ["m5"]


def test_a_message_cannot_be_delivered_and_a_dead_letter() -> None:
    history = history_of(9)
    history.committed["m5"] = replace(history.committed["m5"], rejected=True)
    history.dead = ["m5"]
    assert check(history).buried == ["m5"]


def test_a_message_that_nobody_wrote_is_invented() -> None:
    history = history_of(9)
    history.deliveries.append(delivery(10))
    assert check(history).invented == ["m10"]


def test_a_message_of_a_rolled_back_transaction_must_not_be_delivered() -> None:
    history = history_of(9)
    history.rolled_back = {"m10"}
    assert not check(history).violations(ordered=True)
    history.deliveries.append(delivery(10))
    assert check(history).uncommitted == ["m10"]


@pytest.mark.parametrize("change", [{"check": 7}, {"position": 99}])
def test_another_body_or_position_than_was_written_is_found(change: dict[str, Any]) -> None:
    history = history_of(9)
    history.deliveries[4] = replace(history.deliveries[4], **change)
    assert check(history).altered == ["m5"]


def test_a_first_delivery_behind_a_higher_position_of_its_key_is_out_of_order() -> None:
    history = history_of(9)
    history.deliveries[4], history.deliveries[6] = history.deliveries[6], history.deliveries[4]
    verdict = check(history)
    assert verdict.disordered == ["m5"]
    assert verdict.violations(ordered=True)
    assert not verdict.violations(ordered=False)


def test_order_is_that_of_each_key_alone() -> None:
    history = history_of(9)
    history.deliveries[4], history.deliveries[5] = history.deliveries[5], history.deliveries[4]
    assert not check(history).disordered


@pytest.mark.parametrize("change", [{"key": None}, {"delayed": True}])
def test_messages_without_a_key_and_delayed_ones_have_no_order(change: dict[str, Any]) -> None:
    history = history_of(9)
    history.deliveries[4], history.deliveries[6] = history.deliveries[6], history.deliveries[4]
    history.committed["m5"] = replace(history.committed["m5"], **change)
    assert not check(history).disordered


def test_order_is_judged_on_first_deliveries() -> None:
    history = history_of(9)
    history.deliveries.append(delivery(5, 2, at=10))
    assert not check(history).disordered


def test_a_commit_behind_a_higher_position_of_its_key_is_counted_and_no_fault() -> None:
    history = history_of(9)
    history.committed["m5"] = replace(history.committed["m5"], commit=100)
    verdict = check(history)
    assert verdict.late == ["m5"]
    assert not verdict.violations(ordered=True)


# --- order when deliveries fail -----------------------------------------------------------------------------


def rejecting(position: int, **settings: Any) -> History:
    """Nine messages of two keys, of which the destination rejects one just when its turn has come."""
    history = history_of(9)
    name = f"m{position}"
    history.committed[name] = replace(history.committed[name], rejected=True)
    history.deliveries = [one for one in history.deliveries if one.id != name]
    history.refused = history.rejected = [Moment(name, position - 1)]
    history.dead = [name]
    for setting, value in settings.items():
        setattr(history, setting, value)
    return history


def swap(history: History, one: int, other: int) -> None:
    """Has two messages delivered each in the other's place."""
    places = {delivery.id: index for index, delivery in enumerate(history.deliveries)}
    first, second = places[f"m{one}"], places[f"m{other}"]
    history.deliveries[first], history.deliveries[second] = history.deliveries[second], history.deliveries[first]


def test_total_order_is_that_of_all_messages_with_a_key_or_without() -> None:
    history = history_of(9)
    history.order = "total"
    history.committed["m5"] = replace(history.committed["m5"], key=None)
    assert not check(history).violations(ordered=True)
    swap(history, 5, 6)
    assert check(history).disordered == ["m5"]


def test_delayed_messages_have_no_place_in_total_order_either() -> None:
    history = history_of(9)
    history.order = "total"
    history.committed["m5"] = replace(history.committed["m5"], delayed=True)
    swap(history, 5, 6)
    assert not check(history).violations(ordered=True)


def test_nothing_may_be_taken_before_the_rejection_of_what_stood_before_it() -> None:
    history = rejecting(5)
    assert not check(history).violations(ordered=True)
    history.rejected = history.refused = [Moment("m5", 6)]  # after m7, of the same key
    assert check(history).disordered == ["m5"]
    history.rejected = history.refused = [Moment("m5", 5)]  # after m6, of another
    assert not check(history).violations(ordered=True)
    history.rejected = history.refused = [Moment("m5", 0)]
    assert not check(history).violations(ordered=True)


def test_a_dead_letter_that_is_redriven_and_taken_has_had_its_turn() -> None:
    history = rejecting(5, dead=[])
    history.deliveries.append(delivery(5, at=10))
    assert not check(history).violations(ordered=True)
    history.rejected = []
    assert check(history).disordered == ["m5"]


def test_a_parked_key_goes_on_only_when_its_dead_letter_is_discarded() -> None:
    history = rejecting(5, on_failure="park", dead=[], discarded=["m5"], discards=[Moment("m5", 5)])
    assert not check(history).violations(ordered=True)
    history.discards = [Moment("m5", 6)]
    assert check(history).disordered == ["m5"]


def test_a_parked_key_goes_on_also_when_its_dead_letter_is_redriven_and_taken() -> None:
    history = rejecting(5, on_failure="park", dead=[])
    history.deliveries.insert(5, delivery(5, at=6.6))
    assert not check(history).violations(ordered=True)
    swap(history, 5, 7)
    assert check(history).disordered == ["m5"]


def test_who_was_refused_loses_its_place_where_failures_are_skipped_and_nobody_else_does() -> None:
    history = history_of(9)
    history.on_failure = "skip"
    history.refused = [Moment("m3", 2), Moment("m3", 4)]
    history.deliveries.append(history.deliveries.pop(2))
    assert not check(history).violations(ordered=True)
    history.deliveries.append(history.deliveries.pop(3))
    assert check(history).disordered == ["m5"]


def test_a_refusal_after_it_was_taken_excuses_nothing() -> None:
    history = history_of(9)
    history.on_failure = "skip"
    history.deliveries.append(history.deliveries.pop(2))
    history.refused = [Moment("m3", 9)]
    assert check(history).disordered == ["m3"]
    history.refused = [Moment("m3", 8)]
    assert not check(history).disordered


@pytest.mark.parametrize("on_failure", ["block", "park"])
def test_a_refusal_excuses_nothing_where_failures_are_not_skipped(on_failure: Any) -> None:
    history = history_of(9)
    history.on_failure = on_failure
    history.refused = [Moment("m3", 2)]
    history.deliveries.append(history.deliveries.pop(2))
    assert check(history).disordered == ["m3"]


# --- dead letters -------------------------------------------------------------------------------------------


def parking() -> History:
    """The destination rejects m5, behind which m7 and m9 are parked at the end."""
    history = rejecting(5, on_failure="park", dead=["m5", "m7", "m9"], parked=[("m7", 5), ("m9", 5)])
    history.deliveries = [one for one in history.deliveries if one.id not in history.dead]
    return history


def test_dead_letters_may_stand_behind_one_of_their_key_that_was_rejected() -> None:
    assert not check(parking()).violations(ordered=True)


def test_a_dead_letter_behind_nobody_is_buried_wrongly() -> None:
    history = parking()
    history.parked.pop()
    assert check(history).buried == ["m9"]


def test_a_dead_letter_left_behind_when_the_one_before_it_has_gone_is_buried_wrongly() -> None:
    history = parking()
    history.dead.remove("m5")
    history.discarded = ["m5"]
    assert check(history).buried == ["m7", "m9"]


def test_what_was_parked_and_is_no_more_has_to_be_delivered() -> None:
    history = parking()
    history.dead.remove("m9")
    assert check(history).lost == ["m9"]


@pytest.mark.parametrize(
    "change", [{"key": "k0"}, {"key": None}, {"delayed": True}], ids=["another key", "no key", "delayed"]
)
@pytest.mark.parametrize("name", ["m5", "m7"])
def test_who_is_parked_behind_a_stranger_is_parked_wrongly(name: str, change: dict[str, Any]) -> None:
    history = parking()
    history.committed[name] = replace(history.committed[name], **change)
    assert check(history).misparked == (["m7", "m9"] if name == "m5" else ["m7"])


def test_nobody_is_parked_behind_one_that_was_never_rejected() -> None:
    history = parking()
    history.rejected = []
    assert check(history).misparked == ["m7", "m9"]


def test_nobody_is_parked_behind_a_higher_position() -> None:
    history = parking()
    history.parked.append(("m3", 5))
    assert check(history).misparked == ["m3"]


@pytest.mark.parametrize("on_failure", ["block", "skip"])
def test_nobody_is_parked_where_failures_do_not_park(on_failure: Any) -> None:
    history = parking()
    history.on_failure = on_failure
    assert check(history).misparked == ["m7", "m9"]


def test_what_was_discarded_is_not_lost_but_only_what_is_rejected_may_be() -> None:
    history = rejecting(5, dead=[], discarded=["m5"])
    assert not check(history).violations(ordered=True)
    history.discarded.append("m7")
    assert check(history).buried == ["m7"]
    history.discarded = []
    assert check(history).lost == ["m5"]


def test_to_intend_to_discard_is_not_to_discard() -> None:
    history = rejecting(5, dead=[], on_failure="park", discards=[Moment("m5", 4)])
    assert check(history).lost == ["m5"]


# --- duplicates ---------------------------------------------------------------------------------------------


def test_a_duplicate_without_a_reason_is_not_explained() -> None:
    history = history_of(9)
    history.deliveries.append(delivery(9, 2, at=10))
    assert check(history).unexplained == ["m9"]


def test_a_killed_relay_explains_what_it_had_in_its_hands_and_no_more() -> None:
    history = history_of(9)
    history.ends = [Span(1, 9.6, 9.6)]
    history.deliveries += [delivery(one, 2, at=10) for one in (7, 8, 9)]
    verdict = check(history)
    assert verdict.explained == ["m8", "m9"]
    assert verdict.unexplained == ["m7"]


def test_what_was_answered_late_was_in_its_hands_for_longer() -> None:
    history = history_of(9)
    history.deliveries[0] = replace(history.deliveries[0], answered=9.4)
    history.ends = [Span(1, 9.3, 9.3)]
    history.deliveries.append(delivery(1, 2, at=10))
    assert check(history).explained == ["m1"]


def test_a_killed_relay_does_not_explain_what_it_delivered_itself_a_second_time() -> None:
    history = history_of(9)
    history.deliveries.append(delivery(3, 2, at=10))
    history.ends = [Span(2, 10.6, 10.6)]
    assert check(history).unexplained == ["m3"]


def test_another_relay_that_was_killed_explains_nothing() -> None:
    history = history_of(9)
    history.ends = [Span(3, 9.6, 9.6)]
    history.deliveries.append(delivery(9, 2, at=10))
    assert check(history).unexplained == ["m9"]


@pytest.mark.parametrize("kind", ["fences", "freezes"])
def test_a_relay_taken_for_dead_may_deliver_after_the_other(kind: str) -> None:
    history = history_of(9)
    history.deliveries[8:] = [delivery(9, 2, at=12), replace(delivery(9, at=9), answered=13.5)]
    setattr(history, kind, [Span(1, 9.2, 13.0)])
    assert check(history).explained == ["m9"]


def test_a_freeze_shorter_than_what_is_left_of_the_lease_explains_nothing() -> None:
    history = history_of(9)
    history.deliveries.append(delivery(9, 2, at=12))
    history.freezes = [Span(1, 9.2, 9.9)]
    assert check(history).unexplained == ["m9"]


def test_an_answer_that_never_came_explains_what_comes_later() -> None:
    history = history_of(9)
    history.deliveries[3] = delivery(4, answered=False)
    history.deliveries.append(delivery(4, 2, at=12))
    assert check(history).explained == ["m4"]


def test_each_further_delivery_needs_its_reason() -> None:
    history = history_of(9)
    history.deliveries[3] = delivery(4, answered=False)
    history.deliveries += [delivery(4, 2, at=12), delivery(4, 2, at=13)]
    assert check(history).unexplained == ["m4"]


def test_a_killed_server_explains_what_it_had_not_flushed_and_no_more() -> None:
    history = history_of(9, held=100)
    history.server_kills = [Span(0, 9.6, 9.7)]
    history.deliveries += [delivery(one, 2, at=10) for one in (8, 9)]
    verdict = check(history)
    assert verdict.explained == ["m9"]
    assert verdict.unexplained == ["m8"]


def test_a_killed_server_may_have_lost_more_than_a_relay_has_in_its_hands() -> None:
    history = history_of(9, held=1)
    history.unflushed = 4.0
    history.server_kills = [Span(0, 9.6, 9.7)]
    history.deliveries += [delivery(one, 2, at=10) for one in (5, 6, 7)]
    verdict = check(history)
    assert verdict.explained == ["m6", "m7"]
    assert verdict.unexplained == ["m5"]


def test_what_could_not_be_settled_before_the_server_was_killed_is_explained() -> None:
    history = history_of(9, held=100)
    history.server_kills = [Span(0, 9.6, 9.7)]
    history.cuts = [Span(1, 5.0, 9.5)]
    history.deliveries += [delivery(one, 2, at=10) for one in (3, 8)]
    verdict = check(history)
    assert verdict.explained == ["m8"]
    assert verdict.unexplained == ["m3"]


def test_a_relay_may_go_on_with_claims_that_a_killed_server_forgot() -> None:
    history = history_of(9)
    history.server_kills = [Span(0, 5.7, 5.8)]
    history.deliveries[5:5] = [delivery(one, 2, at=5.9) for one in (6, 7, 8)]
    verdict = check(history)
    assert verdict.explained == ["m6", "m7"]
    assert verdict.unexplained == ["m8"]


# --- the record ---------------------------------------------------------------------------------------------


def _lines(history: History) -> list[str]:
    names = ("order", "on_failure", "lease", "held", "unflushed")
    facts: list[dict[str, Any]] = [{"do": "settings", **{name: getattr(history, name) for name in names}}]
    for call, one in enumerate(history.deliveries):
        facts += _moments(history, call)
        message = [one.id, one.position, one.check]
        facts.append({"do": "took", "relay": one.relay, "call": call, "begun": one.begun, "messages": [message]})
        if one.answered is not None:
            facts.append({"do": "answered", "at": one.answered, "relay": one.relay, "call": call})
    rows = [[m.id, m.position, m.key, m.check, m.delayed, m.rejected, m.commit] for m in history.committed.values()]
    facts += _moments(history, len(history.deliveries)) + [{"do": "passed_over"}] * history.passed_over
    facts += [
        {"do": "committed", "messages": rows},
        {"do": "rolled_back", "messages": list(history.rolled_back)},
        {"do": "parked", "messages": history.parked},
        {"do": "dead", "messages": history.dead},
        {"do": "discarded", "messages": history.discarded},
    ]
    for kind in ("end", "fence", "freeze", "cut", "server_kill"):
        spans: list[Span] = getattr(history, f"{kind}s")
        facts += [{"do": kind, "relay": one.relay, "since": one.since, "until": one.until} for one in spans]
    return [json.dumps(fact) for fact in facts]


def _moments(history: History, after: int) -> list[dict[str, Any]]:
    return [
        {"do": kind, "messages": [one.id]}
        for kind in ("refused", "rejected", "discards")
        for one in getattr(history, kind)
        if one.after == after
    ]


def test_a_history_is_read_from_its_record_and_half_a_line_is_passed_over() -> None:
    history = history_of(9)
    history.deliveries[3] = delivery(4, answered=False)
    history.rolled_back, history.dead, history.ends = {"m10"}, ["m11"], [Span(1, 2.0, 2.0)]
    history.order, history.on_failure, history.passed_over = "total", "park", 2
    history.refused, history.rejected = [Moment("m4", 3), Moment("m5", 4)], [Moment("m11", 4)]
    history.discards, history.discarded, history.parked = [Moment("m12", 9)], ["m12"], [("m13", 11)]
    history.server_kills, history.cuts = [Span(0, 3.0, 4.0)], [Span(1, 3.0, 5.0)]
    history.fences, history.freezes = [Span(1, 6.0, 6.0)], [Span(1, 6.0, 7.0)]
    lines = _lines(history)
    assert History.read([*lines[:4], "", lines[4][:20], *lines[4:]]) == history


# --- histories that hypothesis makes ------------------------------------------------------------------------


@dataclass
class _Story:
    """What relays that never err make of some messages, while their destination, an operator and death have their say.

    Every lane is a queue, and a message without a place in the order has a lane of its own.
    """

    draw: st.DrawFn
    history: History
    now: float = 0.0
    relay: int = 1
    lanes: dict[str, list[str]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    """The dead letter of each parked lane."""
    behind: dict[str, list[str]] = field(default_factory=dict)

    def write(self, number: int, key: str | None, *, delayed: bool) -> None:
        name = f"m{number}"
        self.history.committed[name] = Committed(name, 10 * number, key, number * 31, delayed, commit=number)
        lane = "all" if self.history.order == "total" else key
        self.lanes.setdefault(name if delayed or not lane else lane, []).append(name)

    def step(self) -> None:
        lane = self.draw(st.sampled_from(sorted(self.lanes)))
        acts: list[Callable[[str], None]] = [self.take] * 6 + [self.refuse, self.reject, self.kill]
        if lane in self.heads:
            acts = [self.park, self.park, self.discard, self.redrive, self.leave]
        self.draw(st.sampled_from(acts))(lane)
        self.lanes = {one: queue for one, queue in self.lanes.items() if queue or one in self.heads}

    def take(self, lane: str) -> None:
        self._deliver(self.lanes[lane].pop(0))

    def refuse(self, lane: str) -> None:
        name = self.lanes[lane][0]
        self.history.refused.append(self._moment(name))
        if self.history.on_failure == "skip":
            del self.lanes[lane][0]
            self.lanes.setdefault(name, []).append(name)

    def reject(self, lane: str) -> None:
        name = self.lanes[lane].pop(0)
        self.history.refused.append(self._moment(name))
        self.history.rejected.append(self._moment(name))
        self._reject(name, rejected=True)
        if self.history.on_failure == "park" and lane != name:
            self.heads[lane], self.behind[lane] = name, []
        else:
            self.draw(st.sampled_from([self.history.dead, self.history.discarded])).append(name)

    def kill(self, _: str) -> None:
        """What it held at last, or some of it, is delivered once more by the next one."""
        self.now += 1
        self.history.ends.append(Span(self.relay, self.now, self.now))
        mine = [one for one in self.history.deliveries if one.relay == self.relay][-self.history.held :]
        self.relay += 1
        again = self.draw(st.lists(st.sampled_from(mine), unique=True)) if mine else []
        self.history.deliveries += [replace(one, relay=self.relay, begun=self.now + 1, answered=None) for one in again]
        self.now += 2

    def park(self, lane: str) -> None:
        if queue := self.lanes[lane]:
            self.behind[lane].append(queue.pop(0))
            self.history.parked.append((self.behind[lane][-1], self.history.committed[self.heads[lane]].position))

    def discard(self, lane: str) -> None:
        self.history.discards.append(self._moment(self.heads[lane]))
        self.history.discarded.append(self._go_on(lane))

    def redrive(self, lane: str) -> None:
        head = self._go_on(lane)
        self._reject(head, rejected=False)
        self._deliver(head)

    def leave(self, lane: str) -> None:
        while self.lanes[lane]:
            self.park(lane)
        self.history.dead.append(self._go_on(lane))
        self.history.dead += self.lanes.pop(lane)

    def _go_on(self, lane: str) -> str:
        self.lanes[lane] = self.behind.pop(lane) + self.lanes[lane]
        return self.heads.pop(lane)

    def _reject(self, name: str, *, rejected: bool) -> None:
        self.history.committed[name] = replace(self.history.committed[name], rejected=rejected)

    def _deliver(self, name: str) -> None:
        self.now += 1
        message = self.history.committed[name]
        self.history.deliveries.append(
            Delivery(name, message.position, self.relay, self.now, self.now + 0.5, message.check)
        )

    def _moment(self, name: str) -> Moment:
        return Moment(name, len(self.history.deliveries))


@st.composite
def good_histories(draw: st.DrawFn) -> History:
    """Several relays deliver each lane in order of position; whatever happens, they do the right thing about it."""
    history = History(
        order=draw(st.sampled_from(["key", "total"])),
        on_failure=draw(st.sampled_from(["block", "park", "skip"])),
        lease=2.0,
        held=draw(st.integers(1, 5)),
        unflushed=1.0,
        rolled_back={f"r{one}" for one in range(draw(st.integers(1, 3)))},
    )
    story = _Story(draw, history)
    for number in range(1, draw(st.integers(2, 30)) + 1):
        story.write(number, draw(st.sampled_from(["a", "b", "c", None])), delayed=draw(st.integers(0, 9)) == 9)
    while story.lanes:
        story.step()
    return history


def _rewrite(history: History, change: Callable[[Delivery], list[Delivery]]) -> None:
    """Puts others in the place of each delivery; what happened between two deliveries still does."""
    deliveries, places = list[Delivery](), [0]
    for one in history.deliveries:
        deliveries += change(one)
        places.append(len(deliveries))
    history.deliveries = deliveries
    for moments in (history.refused, history.rejected, history.discards):
        moments[:] = [replace(one, after=places[one.after]) for one in moments]


def _lose(history: History, victim: Delivery) -> None:
    _rewrite(history, lambda one: [] if one.id == victim.id else [one])


def _invent(history: History, _: Delivery) -> None:
    history.deliveries.append(Delivery("x", 99, 1, 0.0, 1.0))


def _deliver_rolled_back(history: History, _: Delivery) -> None:
    history.deliveries.append(Delivery(min(history.rolled_back), 99, 1, 0.0, 1.0))


def _duplicate(history: History, victim: Delivery) -> None:
    later = max(one.begun for one in history.deliveries) + 10
    # By a relay to which nothing happened, twice: at most the first of them is explained.
    again = replace(victim, relay=77, begun=later, answered=later + 0.5)
    history.deliveries += [again, replace(again, relay=78)]


def _alter(history: History, victim: Delivery) -> None:
    history.deliveries[history.deliveries.index(victim)] = replace(victim, check=-1)


def _bury(history: History, victim: Delivery) -> None:
    _lose(history, victim)
    history.dead.append(victim.id)


def _reorder(history: History, victim: Delivery) -> None:
    written = history.committed[victim.id]
    excused = {one.id for one in (*history.refused, *history.rejected)}
    assume(not written.delayed and victim.id not in excused and (written.key or history.order == "total"))
    first = next(one for one in history.deliveries if one.id == victim.id)
    hasty = replace(first, id="hasty", position=written.position + 1, answered=None)
    history.committed["hasty"] = replace(written, id="hasty", position=hasty.position)
    _rewrite(history, lambda one: [hasty, one] if one is first else [one])


def _park(history: History, victim: Delivery) -> None:
    history.parked.append((victim.id, victim.position - 1))  # where nobody is


FAULTS: dict[str, tuple[Callable[[History, Delivery], None], str]] = {
    "lost": (_lose, "lost"),
    "invented": (_invent, "invented"),
    "rolled back": (_deliver_rolled_back, "uncommitted"),
    "duplicated": (_duplicate, "unexplained"),
    "altered": (_alter, "altered"),
    "buried": (_bury, "buried"),
    "reordered": (_reorder, "disordered"),
    "parked": (_park, "misparked"),
}


@given(history=good_histories())
def test_no_good_history_breaks_anything(history: History) -> None:
    verdict = check(history)
    assert not verdict.violations(ordered=True)
    assert set(verdict.explained) == {
        one.id for one in history.deliveries if sum(other.id == one.id for other in history.deliveries) > 1
    }


@given(history=good_histories(), fault=st.sampled_from(sorted(FAULTS)), choice=st.randoms(use_true_random=False))
def test_a_fault_seeded_into_a_good_history_is_found_and_nothing_else(
    history: History, fault: str, choice: Any
) -> None:
    assume(history.deliveries)
    seed, finding = FAULTS[fault]
    seed(history, choice.choice(history.deliveries))
    verdict = check(history)
    assert len(getattr(verdict, finding)) == 1
    assert len(verdict.violations(ordered=True)) == 1
