"""Measures this library, the same work by hand, and its peers, in one run: `make bench`, or `make bench-full`.

The machine may be shared and noisy, so only ratios mean anything. Every side has a process, an environment and a
database of its own; in each round every side takes its turn (A B C A B C), and a ratio is that of the medians. The
server is the embedded one, with its durable settings; the destination accepts at once and does nothing.
"""

import argparse
import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Final

from rich.console import Console

from benchmarks import _report
from benchmarks._matrix import GROUPS
from benchmarks._pgbench import PgBench
from benchmarks._rounds import FULL, SHORT, AnySide, Plan, Rounds
from benchmarks._sides import ROOT, SIDES, Running, SideError, database, environment
from benchmarks.sides.ours import Counting
from outbox import embedded

__all__ = ["Counting"]  # benchmarks/instrumentation.py takes it from here

SETTINGS: Final = {"shared_buffers": "1GB", "max_wal_size": "4GB", "checkpoint_timeout": "30min"}
"""Durable as it comes. A checkpoint would strike one side and not another, so none falls into a run."""
OUTPUT: Final = {"full": ROOT / "docs" / "benchmarks", "short": ROOT / "docs" / "benchmarks" / "short"}
_SO_FAR: Final = ROOT / ".bench"
_CONSOLE: Final = Console(stderr=True)


async def measure(plan: Plan, sides: Sequence[str], only: Sequence[str]) -> _report.Results:
    """Runs it on a server of its own."""
    for name in sides:
        environment(name)
    started, at = perf_counter(), datetime.now(UTC)
    async with embedded.postgres(**SETTINGS) as dsn:
        running, missing = await _start(dsn, sides)
        rounds = Rounds(plan, dsn, running, _say)
        about = await _report.about(dsn, plan, at, SETTINGS)
        results = _report.Results(about, _report.describe(running, missing), rounds.figures)
        try:
            for group in only:
                await _group(rounds, group)
                about["took"] = f"{perf_counter() - started:.0f} s"
                _report.keep(results, _SO_FAR)  # of a run that somebody ends, too
        finally:
            await rounds.stop()
    return results


async def _start(dsn: str, names: Sequence[str]) -> tuple[dict[str, AnySide], dict[str, str]]:
    """Starts the sides; returns those that run, and why the others do not."""
    running: dict[str, AnySide] = {}
    missing: dict[str, str] = {}

    async def start(name: str) -> None:
        there = await database(dsn, name)
        try:
            side = await (PgBench.start(there) if name == "pgbench" else Running.start(name, there))
            await _warm(side)
        except SideError as error:
            missing[name] = str(error)
            _say(f"{name} takes no part: {error}")
        else:
            running[name] = side

    everyone = [*names, *["pgbench"] * ("by_hand" in names)]
    await asyncio.gather(*map(start, everyone))
    return {name: running[name] for name in everyone if name in running}, missing


async def _warm(side: AnySide) -> None:
    """Makes its tables, and has it import all that it needs before anything counts."""
    await side.ask("prepare")
    for variant in side.settings:
        await side.ask("fill", messages=100, keys=0, size=300)
        await side.ask("drain", seconds=1, messages=100, batch=10, variant=variant)


async def _group(rounds: Rounds, group: str) -> None:
    started = perf_counter()
    for cell in GROUPS[group](rounds):
        await rounds.measure(cell)
        _say(f"{group}, {next(iter(cell.works))}: done after {perf_counter() - started:.0f} s")


def _say(text: str) -> None:
    _CONSOLE.print(text, style="dim", highlight=False, markup=False)


def main() -> None:
    """Reads the arguments, measures, and reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="less of it, in two minutes")
    parser.add_argument("--only", metavar="GROUP,…", default=",".join(GROUPS), help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--sides", metavar="SIDE,…", default=",".join(SIDES), help=f"of {', '.join(SIDES)}")
    parser.add_argument("--output", type=Path, help="the folder of the report; only a complete run has one by itself")
    arguments = parser.parse_args()
    only, sides = arguments.only.split(","), arguments.sides.split(",")
    for name, known in [*((name, GROUPS) for name in only), *((name, SIDES) for name in sides)]:
        if name not in known:
            parser.error(f"{name!r} is none of {', '.join(known)}")
    plan = SHORT if arguments.short else FULL
    results = asyncio.run(measure(plan, sides, only))
    _report.show(results)
    complete = set(only) == set(GROUPS) and set(sides) == set(SIDES)
    output = arguments.output or (OUTPUT[plan.name] if complete else None)
    if output:
        _report.write(results, output)
        _say(f"written to {output}")


if __name__ == "__main__":
    main()
