"""Decides from the record of a run whether the outbox kept its promises.

Everything here is pure: a `History` in, a `Verdict` out. A history is kept as lines of JSON, one fact each, in the
order in which they were written down; times are seconds of a clock that all processes of a machine share.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self


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
class Span:
    """Something that happened to a relay, or with 0 to all of them, from one moment to another."""

    relay: int
    since: float
    until: float


@dataclass
class History:
    """What happened in one run."""

    lease: float = 10.0
    held: int = 301
    """Messages that one relay has in its hands at most."""
    unflushed: float = 2.0
    """Seconds before the death of a server whose commits may be lost where nobody waited for the disk."""
    committed: dict[str, Committed] = field(default_factory=dict)
    rolled_back: set[str] = field(default_factory=set)
    deliveries: list[Delivery] = field(default_factory=list)
    """In the order in which the destination took them."""
    dead: list[str] = field(default_factory=list)
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
                self.lease, self.held, self.unflushed = fact["lease"], fact["held"], fact["unflushed"]
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
            case "dead":
                self.dead += fact["messages"]
            case "end" | "fence" | "freeze" | "cut" | "server_kill" as kind:
                getattr(self, f"{kind}s").append(Span(fact["relay"], fact["since"], fact["until"]))
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
    """Dead letters that the destination would have taken, and those that were delivered or never committed."""
    disordered: list[str]
    """First delivered after a message of the same key that has a higher position."""
    late: list[str]
    """Committed after a message of the same key that has a higher position: no fault, but the hard case."""

    def violations(self, *, ordered: bool) -> list[str]:
        """Says what was broken, in one sentence each; order only where it was promised."""
        broken = {
            "lost": self.lost,
            "invented": self.invented,
            "delivered though rolled back": self.uncommitted,
            "altered": self.altered,
            "delivered again without a reason": self.unexplained,
            "buried wrongly": self.buried,
            "out of order": self.disordered if ordered else [],
        }
        return [f"{len(names)} {what}, the first are {', '.join(names[:3])}" for what, names in broken.items() if names]


def check(history: History) -> Verdict:
    """Judges a history."""
    committed, first = history.committed, dict[str, Delivery]()
    for delivery in history.deliveries:
        first.setdefault(delivery.id, delivery)
    dead = set(history.dead)
    explained, unexplained = _duplicates(history)
    return Verdict(
        lost=[name for name in committed if name not in first and name not in dead],
        invented=[name for name in first if name not in committed and name not in history.rolled_back],
        uncommitted=[name for name in first if name in history.rolled_back and name not in committed],
        altered=list({one.id: None for one in history.deliveries if _is_altered(one, committed.get(one.id))}),
        explained=explained,
        unexplained=unexplained,
        buried=[name for name in dead if name in first or name not in committed or not committed[name].rejected],
        disordered=_disordered([committed[name] for name in first if name in committed]),
        late=_disordered(
            sorted(
                (one for one in committed.values() if one.commit is not None),
                key=lambda one: (one.commit or 0, one.position),
            )
        ),
    )


def _is_altered(delivery: Delivery, written: Committed | None) -> bool:
    return written is not None and (delivery.position, delivery.check) != (written.position, written.check)


def _disordered(messages: Iterable[Committed]) -> list[str]:
    """Names those that come, in this sequence, after a higher position of their own key."""
    highest: dict[str, int] = {}
    late = []
    for message in messages:
        if message.key is not None and not message.delayed:
            if message.position < highest.get(message.key, message.position):
                late.append(message.id)
            highest[message.key] = max(message.position, highest.get(message.key, message.position))
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
        yield from ((index, _LOST) for index in hands.unsettled_in(span) if hands.answer(index) > since)
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

    def held_over(self, span: Span) -> list[int]:
        """Those under way when the span ended, and as many begun later as a relay may have had ready."""
        deliveries = self._history.deliveries
        under_way = [
            index for index in self._begun if deliveries[index].begun <= span.until and self.answer(index) > span.since
        ]
        later = [index for index in self._begun if deliveries[index].begun > span.until]
        return under_way + later[: self._history.held]
