"""Decides from the record of a run whether the outbox kept its promises.

Everything here is pure: a `History` in, a `Verdict` out. A history is kept as lines of JSON, one fact each, in the
order in which they were written down; times are seconds of a clock that all processes of a machine share.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self


@dataclass(frozen=True, slots=True)
class Committed:
    """A message whose transaction committed."""

    id: str
    position: int
    key: str | None = None
    check: int = 0
    """A checksum of the body."""
    delayed: bool = False
    """It was not to be delivered at once, and has no place in the order of its key."""
    rejected: bool = False
    """The destination rejects it for ever: it has to end as a dead letter."""
    commit: int | None = None
    """Its number in the order of the commits; None when the COMMIT got no answer."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that the destination took."""

    id: str
    position: int
    relay: int
    """The process id of the relay that brought it."""
    begun: float
    """When the destination was called."""
    answered: float | None
    """When the destination said that it took it; None when it never did, or said the opposite."""
    check: int = 0


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened to a message, told by how many deliveries were written down before it."""

    id: str
    after: int


@dataclass(frozen=True, slots=True)
class Span:
    """Something that happened to a relay, or with 0 to all of them, from one moment to another."""

    relay: int
    since: float
    until: float


@dataclass
class History:
    """What happened in one run."""

    order: Literal["none", "key", "total"] = "key"
    on_failure: Literal["block", "park", "skip"] = "block"
    lease: float = 10.0
    held: int = 301
    """Messages that one relay has in its hands at most."""
    unflushed: float = 2.0
    """Seconds before the death of a server whose commits may be lost where nobody waited for the disk."""
    committed: dict[str, Committed] = field(default_factory=dict)
    rolled_back: set[str] = field(default_factory=set)
    deliveries: list[Delivery] = field(default_factory=list)
    """In the order in which the destination took them."""
    refused: list[Moment] = field(default_factory=list)
    """Messages of which the destination said, or let a relay think, that it did not take them; not when it was down."""
    rejected: list[Moment] = field(default_factory=list)
    """Those of them for which it said: never."""
    discards: list[Moment] = field(default_factory=list)
    """Dead letters that somebody was about to discard."""
    parked: list[tuple[str, int]] = field(default_factory=list)
    """Dead letters that were seen behind another, each with the position of that one."""
    dead: list[str] = field(default_factory=list)
    """The dead letters of the end."""
    discarded: list[str] = field(default_factory=list)
    """Dead letters that are no more since somebody did discard them."""
    passed_over: int = 0
    """Writers that a relay waited for no longer."""
    ends: list[Span] = field(default_factory=list)
    """Relays that were killed, or stopped while they could not reach the database."""
    fences: list[Span] = field(default_factory=list)
    """Relays that found that they had been taken for dead."""
    freezes: list[Span] = field(default_factory=list)
    cuts: list[Span] = field(default_factory=list)
    """Times in which a relay could not, or hardly, settle what it had delivered."""
    server_kills: list[Span] = field(default_factory=list)

    @classmethod
    def read(cls, lines: Iterable[str]) -> Self:
        """Makes a history of its record; what a process that was killed left of a line is passed over."""
        history, answers = cls(), dict[tuple[int, int], float]()
        facts = list(_facts(lines))
        for fact in facts:
            if fact["do"] == "answered":
                answers[fact["relay"], fact["call"]] = fact["at"]
        for fact in facts:
            history._add(fact, answers)
        return history

    def _add(self, fact: dict[str, Any], answers: dict[tuple[int, int], float]) -> None:
        match fact["do"]:
            case "settings":
                for name in ("order", "on_failure", "lease", "held", "unflushed"):
                    setattr(self, name, fact[name])
            case "took":
                answered = answers.get((fact["relay"], fact["call"]))
                self.deliveries += [
                    Delivery(name, position, fact["relay"], fact["begun"], answered, check)
                    for name, position, check in fact["messages"]
                ]
            case "committed":
                self.committed |= {row[0]: Committed(*row) for row in fact["messages"]}
            case "rolled_back":
                self.rolled_back |= set(fact["messages"])
            case "end" | "fence" | "freeze" | "cut" | "server_kill" as kind:
                getattr(self, f"{kind}s").append(Span(fact["relay"], fact["since"], fact["until"]))
            case _:
                self._add_refusal(fact)

    def _add_refusal(self, fact: dict[str, Any]) -> None:
        match fact["do"]:
            case "refused" | "rejected" | "discards" as kind:
                getattr(self, kind).extend(Moment(name, len(self.deliveries)) for name in fact["messages"])
            case "dead" | "discarded" as kind:
                getattr(self, kind).extend(fact["messages"])
            case "parked":
                self.parked += [(name, behind) for name, behind in fact["messages"]]
            case "passed_over":
                self.passed_over += 1
            case _:  # answers, which are read first
                pass


def _facts(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            fact = json.loads(line)
        except ValueError:
            continue
        yield fact


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the promises; each list names messages."""

    lost: list[str]
    """Committed, and neither delivered nor a dead letter."""
    invented: list[str]
    """Delivered, and never written."""
    uncommitted: list[str]
    """Delivered, though their transaction was rolled back."""
    altered: list[str]
    """Delivered with another body or position than was written."""
    explained: list[str]
    """Delivered again where a death or a missing answer explains it."""
    unexplained: list[str]
    """Delivered again where nothing explains it."""
    buried: list[str]
    """Dead letters, discarded or not, that the destination would have taken, and those delivered or never committed."""
    misparked: list[str]
    """Dead letters seen behind one that does not park them: of another key, never rejected, or not before them."""
    disordered: list[str]
    """Those whose turn came too late, after one of the same lane with a higher position; see `_turns`."""
    late: list[str]
    """Committed after a message of the same lane that has a higher position: no fault, but the hard case."""

    def violations(self, *, ordered: bool) -> list[str]:
        """Says what was broken, in one sentence each; order only where it was promised."""
        broken = {
            "lost": self.lost,
            "invented": self.invented,
            "delivered though rolled back": self.uncommitted,
            "altered": self.altered,
            "delivered again without a reason": self.unexplained,
            "buried wrongly": self.buried,
            "parked wrongly": self.misparked,
            "out of order": self.disordered if ordered else [],
        }
        return [f"{len(names)} {what}, the first are {', '.join(names[:3])}" for what, names in broken.items() if names]


def check(history: History) -> Verdict:
    """Judges a history."""
    committed, first = history.committed, dict[str, Delivery]()
    for delivery in history.deliveries:
        first.setdefault(delivery.id, delivery)
    gone = {*history.dead, *history.discarded}
    explained, unexplained = _duplicates(history)
    return Verdict(
        lost=[name for name in committed if name not in first and name not in gone],
        invented=[name for name in first if name not in committed and name not in history.rolled_back],
        uncommitted=[name for name in first if name in history.rolled_back and name not in committed],
        altered=list({one.id: None for one in history.deliveries if _is_altered(one, committed.get(one.id))}),
        explained=explained,
        unexplained=unexplained,
        buried=_buried(history, first.keys()),
        misparked=_misparked(history),
        disordered=_disordered(history.order, _turns(history)),
        late=_disordered(
            history.order,
            sorted(
                ((one, True) for one in committed.values() if one.commit is not None),
                key=lambda turn: (turn[0].commit or 0, turn[0].position),
            ),
        ),
    )


def _is_altered(delivery: Delivery, written: Committed | None) -> bool:
    return written is not None and (delivery.position, delivery.check) != (written.position, written.check)


# --- dead letters -----------------------------------------------------------------------------------------


def _buried(history: History, delivered: Collection[str]) -> list[str]:
    """Names the dead letters that should be none.

    At the end, with everybody gone, one that is not rejected itself may stand only behind one that is still there.
    """
    positions = {history.committed[name].position for name in history.dead if name in history.committed}
    parked = {name for name, behind in history.parked if behind in positions} & set(history.dead)
    return [
        name
        for name in (*history.dead, *history.discarded)
        if name in delivered
        or name not in history.committed
        or not (history.committed[name].rejected or name in parked)
    ]


def _misparked(history: History) -> list[str]:
    heads = {
        history.committed[one.id].position: history.committed[one.id]
        for one in history.rejected
        if one.id in history.committed
    }
    return [
        name
        for name, behind in history.parked
        if history.on_failure != "park"
        or not (one := history.committed.get(name))
        or not (head := heads.get(behind))
        or (lane := _lane(history.order, one)) is None
        or lane != _lane(history.order, head)
        or head.position >= one.position
    ]


# --- order ------------------------------------------------------------------------------------------------


def _lane(order: str, message: Committed) -> str | None:
    """Returns what the message has its place in, if it has one; where no order is promised, that of its key."""
    if message.delayed:
        return None
    return "all" if order == "total" else message.key


def _turns(history: History) -> list[tuple[Committed, bool]]:
    """Returns the messages in the order in which each had its turn, and whether those behind it count on that.

    A message has its turn when the destination takes it for the first time. One that the destination rejects has it
    when it does not hold up the others any more: under "block" when it is rejected for the first time, after which it
    may be given up; under "park" when somebody is about to discard it. Such a turn may come early, but not late.
    Under "skip" a message that was refused before it was taken has no turn, since it gave up its place; those that
    never were are in order among themselves.
    """
    turns: dict[str, float] = {}
    for index, delivery in enumerate(history.deliveries):
        turns.setdefault(delivery.id, index + 0.5)
    taken = set(turns.items())
    if history.order != "none" and history.on_failure == "skip":
        for moment in history.refused:
            if moment.after <= turns.get(moment.id, -1.0):
                del turns[moment.id]
    elif history.order != "none":
        for moment in history.rejected if history.on_failure == "block" else history.discards:
            turns[moment.id] = min(moment.after, turns.get(moment.id, float("inf")))
    return [
        (history.committed[turn[0]], turn in taken)
        for turn in sorted(turns.items(), key=lambda turn: turn[1])
        if turn[0] in history.committed
    ]


def _disordered(order: str, turns: Iterable[tuple[Committed, bool]]) -> list[str]:
    """Names those that come, in this sequence, after a higher position of their own lane that counts."""
    highest: dict[str, int] = {}
    late = []
    for message, counts in turns:
        lane = _lane(order, message)
        if lane is not None:
            if message.position < highest.get(lane, message.position):
                late.append(message.id)
            if counts:
                highest[lane] = max(message.position, highest.get(lane, message.position))
    return late


# --- duplicates -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Excuse:
    """Why a delivery may have gone unsettled, so that another one later is explained."""

    overtaken_since: float | None = None
    """From this time on another relay may have had the message as well: what that one delivers first, explains this."""


_LOST: Final = _Excuse()
_OVERTAKEN: Final = _Excuse(overtaken_since=float("-inf"))


def _duplicates(history: History) -> tuple[list[str], list[str]]:
    """Names those delivered more than once, explained and not.

    A delivery after others is explained if each of those may have gone unsettled, or came from a relay that got the
    message while this one had it in its hands. So a relay that was killed excuses what others deliver afterwards, and
    not what it delivered itself of messages that were settled long ago.
    """
    excuses = _excuses(history)
    several: defaultdict[str, list[int]] = defaultdict(list)
    for index, delivery in enumerate(history.deliveries):
        several[delivery.id].append(index)
    explained, unexplained = list[str](), list[str]()
    for name, indexes in several.items():
        if len(indexes) > 1:
            fine = all(
                excuses[earlier] or _is_overtaken(history.deliveries[earlier], excuses[later])
                for number, later in enumerate(indexes)
                for earlier in indexes[:number]
            )
            (explained if fine else unexplained).append(name)
    return explained, unexplained


def _is_overtaken(earlier: Delivery, excuses: Iterable[_Excuse]) -> bool:
    return any(
        one.overtaken_since is not None and (earlier.answered or earlier.begun) >= one.overtaken_since
        for one in excuses
    )


def _excuses(history: History) -> defaultdict[int, set[_Excuse]]:
    """Finds what excuses each delivery, by its index."""
    excuses: defaultdict[int, set[_Excuse]] = defaultdict(set)
    by_relay: defaultdict[int, list[int]] = defaultdict(list)
    for index, delivery in enumerate(history.deliveries):
        by_relay[delivery.relay].append(index)
        if delivery.answered is None:
            excuses[index].add(_LOST)
    for relay, indexes in by_relay.items():
        for index, excuse in _excuses_of(history, relay, _Hands(history, indexes)):
            excuses[index].add(excuse)
    return excuses


def _excuses_of(history: History, relay: int, hands: "_Hands") -> Iterator[tuple[int, _Excuse]]:
    # With a third of the lease gone at most since the last sign of life, two thirds are left at least.
    freezes = [one for one in history.freezes if one.until - one.since > history.lease * 0.6]
    for span in history.ends:
        if span.relay == relay:
            yield from ((index, _LOST) for index in hands.unsettled_in(span))
    for span in (*history.fences, *freezes):
        if span.relay == relay:
            yield from ((index, _OVERTAKEN) for index in hands.unsettled_in(span))
    for span in history.server_kills:
        since = _unflushed_since(history, relay, span)
        yield from ((index, _LOST) for index in hands.under_way(since, span.until))
        # The claims of that time may be lost, and others claim the same while this relay goes on with them.
        forgotten = _Excuse(overtaken_since=span.since)
        yield from ((index, forgotten) for index in hands.held_over(span))


def _unflushed_since(history: History, relay: int, kill: Span) -> float:
    """Returns the time from which a relay's settling may be lost with the server; earlier if it was cut off."""
    since, before = kill.since - history.unflushed, float("inf")
    cuts = [one for one in (*history.cuts, *history.freezes) if one.relay in {0, relay} and one.since < kill.since]
    while since < before:
        before = since
        since = min([since, *(one.since - history.unflushed for one in cuts if one.until >= since)])
    return since


class _Hands:
    """What one relay had in its hands, as far as it can be known from outside."""

    def __init__(self, history: History, indexes: Sequence[int]) -> None:
        self._history = history
        self._begun = sorted(indexes, key=lambda index: history.deliveries[index].begun)
        self._answered = sorted(
            (index for index in indexes if history.deliveries[index].answered is not None), key=self.answer
        )

    def answer(self, index: int) -> float:
        """When it was answered; never is infinitely late."""
        return self._history.deliveries[index].answered or float("inf")

    def unsettled_in(self, span: Span) -> list[int]:
        """Those under way at some time of the span, and as many before as a relay may have had unsettled."""
        begun = self._history.deliveries
        before = [index for index in self._answered if self.answer(index) < span.since]
        within = [index for index in self._begun if begun[index].begun <= span.until]
        return before[-self._history.held :] + [index for index in within if self.answer(index) >= span.since]

    def under_way(self, since: float, until: float) -> list[int]:
        """Those of which the destination had the call, or had just answered it, at some time between the two."""
        deliveries = self._history.deliveries
        return [index for index in self._begun if deliveries[index].begun <= until and self.answer(index) > since]

    def held_over(self, span: Span) -> list[int]:
        """Those under way when the span ended, and as many begun later as a relay may have had ready."""
        later = [index for index in self._begun if self._history.deliveries[index].begun > span.until]
        return self.under_way(span.since, span.until) + later[: self._history.held]
