"""The matrix: what is measured, in groups of cells."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Final

from benchmarks._figures import is_peer
from benchmarks._pgbench import SCRIPTS
from benchmarks._rounds import SIZE, AnySide, Cell, Peers, Rounds, Who
from benchmarks._sides import ROOT, MissingError, Running, SideError, Turn, environment
from benchmarks.sides import _work
from benchmarks.sides._tricks import DRAINING, IN_HAND, TRAFFIC

_ENDLESS: Final = 1 << 40
"""More messages than there are: a drain ends by its time."""
_USUAL_BATCH: Final = 100
_LARGEST_BATCH: Final = 1_000
_PEERS_COUNT: Final = 10
_OURS_ALONE: Final = ((10, 8), (10, 32))
"""Messages and connections of what would take too long with every side."""
_RARELY: Final = 20
_OFTEN: Final = 400
_BROKER: Final = 0.01
"""Seconds that a batch takes where the peers are compared too."""
_SOME: Final = 100_000
_IMPORTS: Final = ("pass", "import asyncpg, anyio, orjson", "import outbox")
_STEADY: Final = {"duration": "s"} | {
    f"{part}{how}": unit
    for how in ("", ", a snapshot held")
    for part, unit in (("p50", "ms"), ("p99", "ms"), ("left at the end", "messages"))
}


def write(rounds: Rounds) -> list[Cell]:
    """Writing, while no relay is at work; and beside one that is woken."""
    loads = [(1, 1, 300), (10, 1, 300), (100, 1, 300)]
    if rounds.plan.every:
        loads += [(10, 8, 300), (1, 32, 300), (10, 32, 300), (1, 1, 2_000), (100, 1, 2_000)]
    beside = "1 in a transaction, 32 connections, a relay in the same process"
    woken = rounds.turns("polling", "default", "notifier")
    return [_write(rounds, *load) for load in loads] + [_write_beside(rounds, "wake-up", woken, beside)]


def _write(rounds: Rounds, count: int, connections: int, size: int) -> Cell:
    work = f"{count} in a transaction, {connections} connection{'s' * (connections > 1)}, {size:,} B"

    async def measure(side: AnySide, variant: str) -> Mapping[str, float]:
        await rounds.emptied(side)
        load = {"per_transaction": count, "connections": connections, "size": size}
        turn = await side.ask("write", seconds=rounds.seconds / 2, variant=variant, **load)
        pending = (await side.ask("rows")).answer["pending"]
        if pending != turn.count:
            raise SideError(f"{side.name} wrote {turn.count:,} messages, and there are {pending:,}")
        return {work: turn.answer}

    loops = ["default", *["uvloop"] * (rounds.plan.every and (connections, size) == (1, SIZE))]
    # What a peer sets for its relay has no part in this.
    wanted = (count, connections) == (_PEERS_COUNT, 1) or (
        rounds.plan.every and (count, connections) not in _OURS_ALONE
    )
    return Cell("write", {work: "messages/s"}, rounds.turns(*loops, by_hand=loops, peers=_if(wanted)), measure)


def _if(wanted: bool) -> Peers:  # noqa: FBT001 -- it reads as a condition
    return "fastest" if wanted else "none"


def _write_beside(rounds: Rounds, group: str, turns: list[Who], work: str, repeated: int | None = None) -> Cell:

    async def measure(side: AnySide, variant: str) -> Mapping[str, float]:
        await rounds.emptied(side)
        turn = await side.ask("write_beside", seconds=2 * rounds.seconds, connections=32, variant=variant)
        return {work: turn.answer}

    return Cell(group, {work: "messages/s"}, turns, measure, repeated)


def drain(rounds: Rounds) -> list[Cell]:
    """Draining by one relay; by four; a backlog of a million."""
    cells = [cell for batch in (1, 10, _USUAL_BATCH, _LARGEST_BATCH) for cell in _drain(rounds, batch)]
    if rounds.plan.deep:
        cells.append(_deep(rounds))
    if rounds.plan.every:
        cells += [_relays(rounds), *_keys(rounds)]
    return cells


def _drain(rounds: Rounds, batch: int) -> list[Cell]:
    work = f"batch {batch:,}"

    async def measure(side: AnySide, variant: str) -> Mapping[str, float]:
        have = await rounds.filled(side, variant, _backlog(rounds, side))
        if side.key == "pgbench":
            have = min(have, _SOME // 2)  # it knows no time, and need not drain all of it
        return {work: (await rounds.drained(side, variant, have, batch=batch)).answer}

    every, usual = rounds.plan.every, batch == _USUAL_BATCH
    loops = ["default", *["uvloop"] * (every and batch >= _USUAL_BATCH)]
    ours, by_hand = [*loops, *["mark"] * (every and usual)], loops
    pgbench = [("pgbench", script) for script in SCRIPTS] * (batch == _LARGEST_BATCH)
    turns = rounds.turns(*ours, by_hand=by_hand, peers=_if(every or usual)) + pgbench
    return [
        Cell("drain", {work: "messages/s"}, turns, measure),
        *[Cell("drain", {work: "messages/s"}, rounds.turns(peers="others"), measure, 2)] * (every and usual),
    ]


def _backlog(rounds: Rounds, side: AnySide) -> int:
    """Returns how many a side has before it: a peer takes long to fill, and is not through with less."""
    return rounds.plan.backlog // (4 if is_peer(side.key) else 1)


def _deep(rounds: Rounds) -> Cell:
    works = [f"{size:,} pending" for size in (rounds.plan.backlog, rounds.plan.deep)]

    async def measure(side: AnySide, variant: str) -> Mapping[str, float]:
        figures = {}
        for work, one, size in zip(
            works, (side, await rounds.elsewhere(side)), (rounds.plan.backlog, rounds.plan.deep), strict=True
        ):
            await rounds.filled(one, variant, size, least=0.8)
            figures[work] = (await rounds.drained(one, variant, _SOME, batch=_USUAL_BATCH)).answer
        return figures

    return Cell("backlog", dict.fromkeys(works, "messages/s"), rounds.turns("default"), measure, 3)


def _relays(rounds: Rounds) -> Cell:
    work = "4 relays, each a process"

    async def measure(side: AnySide, variant: str) -> Mapping[str, float]:
        # A side that would empty its backlog in that time is told so, and has no figure.
        await rounds.filled(side, variant, _backlog(rounds, side), least=0.95)
        load = {"messages": _ENDLESS, "batch": 100, "variant": variant}
        asked = [one.ask("drain", seconds=rounds.drain, **load) for one in await rounds.siblings(side, 4)]
        # All answer before one error counts: an answer nobody reads would be taken for that of the next question.
        answers = await asyncio.gather(*asked, return_exceptions=True)
        turns = [answer for answer in answers if isinstance(answer, Turn)]
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        if not await rounds.accounted(side, *turns):
            raise SideError(f"{side.name} emptied the backlog before the time was over: the figure means nothing")
        return {work: sum(turn.answer for turn in turns)}

    return Cell(
        "relays", {work: "messages/s"}, rounds.turns("default", by_hand=["default"], peers="fastest"), measure, 3
    )


def _keys(rounds: Rounds) -> list[Cell]:
    ours, peers = rounds.turns("default"), rounds.turns(peers="fastest")
    return [
        _ordered(rounds, 1_000, ours + peers, order=False),
        _ordered(rounds, 1_000, ours + peers, order=True),
        _ordered(rounds, 20, ours, order=True),
        _ordered(rounds, 20, peers, order=True, repeated=1),  # half a minute each, to do little and to stop
    ]


def _ordered(rounds: Rounds, keys: int, turns: list[Who], *, order: bool, repeated: int = 3) -> Cell:
    work = f"{keys:,} keys, {'in the order of a key' if order else 'no order'}"

    async def measure(side: AnySide, variant: str) -> Mapping[str, float]:
        have = await rounds.filled(side, variant, _backlog(rounds, side), keys=keys)
        return {work: (await rounds.drained(side, variant, have, batch=_USUAL_BATCH, order=order)).answer}

    return Cell("keys", {work: "messages/s"}, turns, measure, repeated)


def slow(rounds: Rounds) -> list[Cell]:
    """A destination that takes its time for each call."""
    cells = []
    for pause in (0.002, _BROKER) if rounds.plan.every else (_BROKER,):
        peers = _if(rounds.plan.every and pause == _BROKER)
        turns = rounds.turns("default", "concurrent", by_hand=["default", "uvloop"], peers=peers)
        cells.append(_slow(rounds, pause, "slow", turns, f"a destination of {pause * 1000:.0f} ms"))
    return cells


def _slow(rounds: Rounds, pause: float, group: str, turns: list[Who], work: str) -> Cell:
    async def measure(side: AnySide, variant: str) -> Mapping[str, float]:
        have = await rounds.filled(side, variant, _backlog(rounds, side))
        return {work: (await rounds.drained(side, variant, have, batch=_USUAL_BATCH, pause=pause)).answer}

    return Cell(group, {work: "messages/s"}, turns, measure, 3)


def latency(rounds: Rounds) -> list[Cell]:
    """From the commit to the destination."""
    cells = []
    for per_second in (_RARELY, _OFTEN) if rounds.plan.every else (_OFTEN,):
        ours = ["default", "notifier", *["uvloop", "polling"] * (rounds.plan.every and per_second == _OFTEN)]
        turns = rounds.turns(
            *ours, by_hand=["default"] * rounds.plan.every, peers=_if(rounds.plan.every), waking=rounds.plan.every
        )
        cells.append(_latency(rounds, per_second, "latency", turns))
    return cells


def _latency(rounds: Rounds, per_second: int, group: str, turns: list[Who]) -> Cell:
    works = [f"{per_second}/s, {part}" for part in ("p50", "p99")]

    async def measure(side: AnySide, variant: str) -> Mapping[str, float]:
        await rounds.emptied(side)
        seconds = 1.5 * rounds.seconds
        turn = await side.ask("latency", per_second=per_second, seconds=seconds, variant=variant)
        wanted = int(per_second * seconds)
        if len(turn.answer) < wanted:
            raise SideError(f"{side.name} delivered {len(turn.answer):,} of {wanted:,} in time")
        # The first ones wait for statements that are prepared: nobody's latency after a second.
        return dict(zip(works, _percentiles(turn.answer[wanted // 4 :]), strict=True))

    return Cell(group, dict.fromkeys(works, "ms"), turns, measure, 3 if per_second == _RARELY else None)


def _percentiles(latencies: list[float]) -> tuple[float, float]:
    return median(latencies), quantiles(latencies, n=100)[98]


def dead(rounds: Rounds) -> list[Cell]:
    """Beside rows that are dead, and that no vacuum can remove because somebody holds a snapshot."""
    cells = [_dead(rounds, rounds.turns("default"), rounds.plan.dead, rounds.plan.rounds)]
    if rounds.plan.every:
        cells.append(_dead(rounds, rounds.turns(by_hand=["default"], peers="fastest"), rounds.plan.backlog // 2, 1))
    return cells


def _dead(rounds: Rounds, turns: list[Who], rows: int, repeated: int) -> Cell:
    some = min(_SOME, rounds.plan.backlog // 2, rows // 4)
    works = {"no dead rows": "messages/s", "beside dead rows": "messages/s", "dead rows": "rows"}

    async def measure(side: AnySide, variant: str) -> Mapping[str, float]:
        await rounds.filled(side, variant, rows + 2 * some, least=1)
        async with _snapshot(side.dsn):
            first = await rounds.drained(side, variant, some, batch=_USUAL_BATCH)
            # A slow side would take minutes for all of them, so it is told how many it made.
            more = await rounds.drained(side, variant, rows - first.count, batch=_LARGEST_BATCH, seconds=6)
            # A relay that stops gives back what it had in hand, and that is slower: no part of this.
            rest = await rounds.drained(side, variant, some // 5, batch=_USUAL_BATCH)
            last = await rounds.drained(side, variant, some, batch=_USUAL_BATCH)
        made = first.count + more.count + rest.count
        return dict(zip(works, (first.answer, last.answer, made), strict=True))

    return Cell("dead", works, turns, measure, repeated)


@asynccontextmanager
async def _snapshot(dsn: str) -> AsyncIterator[None]:
    """Holds one, as a forgotten transaction does, until the block ends."""
    async with _work.connected(dsn, 1) as (connection,), connection.transaction(isolation="repeatable_read"):
        # Not the table of messages: that would keep it from being truncated.
        await connection.fetchval("SELECT count(*) FROM orders")
        yield


def steady(rounds: Rounds) -> list[Cell]:
    """Traffic for minutes, with and without a snapshot held all the time: at once, each in a database of its own."""
    if not rounds.plan.steady:
        return []
    seconds = rounds.plan.steady
    load = {"per_second": 3_000, "per_transaction": 10, "seconds": seconds}

    async def minutes(side: AnySide, variant: str) -> tuple[float, float, float]:
        turn = await side.ask("latency", variant=variant, **load)
        return *_percentiles(turn.answer), (await side.ask("rows")).answer["pending"]

    async def measure(side: AnySide, variant: str) -> Mapping[str, float]:
        sides = side, await rounds.elsewhere(side)
        for one in sides:
            await rounds.emptied(one)
        async with _snapshot(sides[1].dsn):
            both = await asyncio.gather(*(minutes(one, variant) for one in sides))
        return dict(zip(_STEADY, (seconds, *both[0], *both[1]), strict=True))

    return [Cell("steady", _STEADY, rounds.turns("default"), measure, 1)]


def memory(rounds: Rounds) -> list[Cell]:
    """What a relay's process takes, idle and amid a large backlog."""
    if not rounds.plan.deep:
        return []
    works = {"idle": "MB", f"{rounds.plan.deep:,} pending": "MB"}

    async def measure(side: AnySide, variant: str) -> Mapping[str, float]:
        if not isinstance(side, Running):
            raise MissingError("it has no relay")
        figures = []
        for messages in (0, rounds.plan.deep):
            await side.ask("fill", messages=messages, keys=0, size=SIZE)
            fresh = await side.sibling()
            try:
                figures.append(await _most(fresh, variant))
            finally:
                await fresh.stop()
        await rounds.emptied(side)
        return dict(zip(works, figures, strict=True))

    return [Cell("memory", works, rounds.turns("default"), measure, 1)]


async def _most(side: Running, variant: str) -> float:
    """Returns the most memory that a process had during a drain, in MB.

    The destination is slow, so that what the harness itself remembers of the deliveries weighs nothing.
    """
    load = {"seconds": 4, "messages": _ENDLESS, "batch": 100, "variant": variant, "pause": 0.05}
    draining, most = asyncio.ensure_future(side.ask("drain", **load)), 0
    while not draining.done():
        most = max(most, _resident(side.pid))
        await asyncio.sleep(0.05)  # how much it has is sampled
    await draining
    return most / 1024


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))


def tricks(rounds: Rounds) -> list[Cell]:
    """The relay without one of its tricks, one at a time."""
    if not rounds.plan.every:
        return []

    async def drain(side: AnySide, variant: str) -> Mapping[str, float]:
        have = await rounds.filled(side, variant, _SOME, least=1)
        return {"drain": (await rounds.drained(side, variant, have, batch=_USUAL_BATCH)).answer}

    traffic = rounds.turns("default", "own BEGIN", "durable", *TRAFFIC)
    return [
        Cell("tricks", {"drain": "messages/s"}, rounds.turns("default", *DRAINING), drain, 3),
        _slow(rounds, _BROKER, "tricks", rounds.turns("default", *IN_HAND), f"drain, {_BROKER * 1000:.0f} ms a call"),
        _write_beside(rounds, "tricks", traffic, "write, 32 connections", 3),
        _latency(rounds, _OFTEN, "tricks", traffic),
    ]


def imports(rounds: Rounds) -> list[Cell]:
    """How long the import of the library takes, in a new process."""
    python = environment("ours")

    async def measure(side: AnySide, variant: str) -> Mapping[str, float]:
        del side, variant
        return {code: await _seconds(str(python), code) * 1000 for code in _IMPORTS}

    return [
        Cell("import", dict.fromkeys(_IMPORTS, "ms"), rounds.turns("default"), measure, 10 if rounds.plan.every else 3)
    ]


async def _seconds(python: str, code: str) -> float:
    started = perf_counter()
    process = await asyncio.create_subprocess_exec(python, "-c", code, cwd=ROOT)
    if await process.wait():
        raise SideError(f"python -c {code!r} failed")
    return perf_counter() - started


GROUPS: Final[Mapping[str, Callable[[Rounds], list[Cell]]]] = {
    "write": write,
    "drain": drain,
    "slow": slow,
    "latency": latency,
    "dead": dead,
    "steady": steady,
    "tricks": tricks,
    "memory": memory,
    "import": imports,
}
"""Names that `--only` takes, and what makes their cells."""
