"""What is wanted at least, and whether it is met: the ratios that this library holds itself to."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from benchmarks._figures import OURS, Figures, Name, Ratio, is_peer

_LOOPS: Final = (("default", "asyncio"), ("uvloop", "uvloop"))
_MEMORY: Final = 50
_ONE: Final = "1 connection, 300 B"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    work: str
    against: str
    wanted: str
    measured: str
    spread: str
    met: bool


def rows(figures: Figures) -> list[Row]:
    """Returns a line for each minimum of which both sides were measured."""
    return [row for part in (_writing, _draining, _peers, _beside, _latency, _memory) for row in part(figures)]


def _row(work: str, against: str, least: float, ratio: Ratio | None) -> Iterator[Row]:
    if ratio:
        spread = f"{ratio.lowest:.2f} to {ratio.highest:.2f}"
        yield Row(work, against, f"{least:g}", f"{ratio.value:.2f}", spread, ratio.value >= least)


def _writing(figures: Figures) -> Iterator[Row]:
    for count, least, against in (
        (1, 0.95, "the same INSERT by plain `execute`"),
        (100, 0.8, "multi-row VALUES by hand, bytes ready"),
    ):
        for variant, loop in _LOOPS:
            work = f"{count} in a transaction, {_ONE}"
            ratio = figures.ratio(Name("write", work, OURS, variant), Name("write", work, "by_hand", variant))
            plural = "messages" if count > 1 else "message"
            yield from _row(f"write {count} {plural} in a business transaction, {loop}", against, least, ratio)
    work = "1 in a transaction, 32 connections, a relay in the same process"
    for variant, how in (("default", "in the process"), ("notifier", "by a `Notifier`")):
        ratio = figures.ratio(Name("wake-up", work, OURS, variant), Name("wake-up", work, OURS, "polling"))
        yield from _row(f"writers, 32 connections, the relay woken {how}", "the same, nobody wakes it", 0.95, ratio)


def _draining(figures: Figures) -> Iterator[Row]:
    hand = "`SKIP LOCKED` and `DELETE` by hand, in one transaction"
    for batch, least in ((100, 2.5), (1, 4.0), (10, 4.0)):
        for variant, loop in _LOOPS:
            ours, floor = (Name("drain", f"batch {batch}", side, variant) for side in (OURS, "by_hand"))
            yield from _row(f"drain, batch {batch}, {loop}", hand, least, figures.ratio(ours, floor))
    program = figures.best("drain", "batch 1,000", lambda side: side == "pgbench")
    for variant, loop in _LOOPS if program else ():
        ratio = figures.ratio(Name("drain", "batch 1,000", OURS, variant), program) if program else None
        yield from _row(f"drain, batch 1,000, {loop}", "pgbench, the best of its scripts", 0.8, ratio)
    work = "a destination of 10 ms"
    ratio = figures.ratio(Name("slow", work, OURS, "concurrent"), Name("slow", work, "by_hand", "uvloop"))
    yield from _row("a destination of 10 ms a batch, batch 100, 24 at once, uvloop", "one at a time by hand", 15, ratio)


def _peers(figures: Figures) -> Iterator[Row]:
    for group, works, least in (
        *((group, figures.works(group), 5.0) for group in ("drain", "relays", "keys", "slow")),
        ("backlog", figures.works("backlog")[1:], 5.0),
        ("write", [f"10 in a transaction, {_ONE}"], 3.0),
    ):
        for work in works:
            ours, peer = (figures.best(group, work, of) for of in (_is_ours, is_peer))
            if ours and peer:
                verb = "write" if group == "write" else "drain"
                against = f"the best peer at its best: {peer.side}, {peer.variant}"
                yield from _row(f"{verb}, {work}; {ours.variant}", against, least, figures.ratio(ours, peer))


def _is_ours(side: str) -> bool:
    return side == OURS


def _beside(figures: Figures) -> Iterator[Row]:
    made = figures.get(Name("dead", "dead rows", OURS, "default"))
    if made:
        ratio = figures.ratio(*(Name("dead", f"{how} dead rows", OURS, "default") for how in ("beside", "no")))
        yield from _row(f"drain beside {made.median:,.0f} dead rows under a held snapshot", "none", 0.95, ratio)
    if figures.works("backlog"):
        usual, deep = (Name("backlog", work, OURS, "default") for work in figures.works("backlog"))
        yield from _row(f"drain, {deep.work}", usual.work, 0.95, figures.ratio(deep, usual))


def _latency(figures: Figures) -> Iterator[Row]:
    for part, least in (("p50", 1.5), ("p99", 6.0)):
        work = f"400/s, {part}"
        peer = figures.best("latency", work, is_peer, least=True)
        best = figures.get(peer) if peer else None
        against = f"or the best peer: {peer.side}, {peer.variant}, {best.median:.2f} ms" if peer and best else ""
        for variant, how in (("default", "in the process"), ("notifier", "by a `Notifier`")):
            ours = figures.get(Name("latency", work, OURS, variant))
            if ours:
                met = ours.median <= least or bool(best and ours.median < best.median)
                spread = f"{min(ours.rounds):.2f} to {max(ours.rounds):.2f}"
                what = f"latency at {work}, woken {how}"
                yield Row(what, against, f"{least:g} ms", f"{ours.median:.2f} ms", spread, met)


def _memory(figures: Figures) -> Iterator[Row]:
    works = figures.works("memory")
    taken = [figures.get(Name("memory", work, OURS, "default")) for work in works]
    if len(taken) > 1 and taken[0] and taken[1]:
        above = taken[1].median - taken[0].median
        yield Row(
            f"memory of a relay, {works[1]}",
            "an idle relay",
            f"{_MEMORY} MB at most",
            f"{above:.1f} MB",
            "",
            above <= _MEMORY,
        )
