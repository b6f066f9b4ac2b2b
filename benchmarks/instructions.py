"""Counts the instructions that a process spends on a message: `make bench-instructions`.

Unlike a time, a count is nearly the same whatever else the machine does. Valgrind counts what a process does itself,
the interpreter and its libraries, and neither the kernel nor the server. Each figure is the difference of two turns,
one of many messages and one of few, so that starting and stopping is no part of it.
"""

import asyncio
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks import _report
from benchmarks._figures import is_peer
from benchmarks._sides import Running, SideError, database
from benchmarks.bench import OUTPUT
from benchmarks.sides._tricks import DRAINING
from outbox import embedded

_FAST: Final = (("ours", "default"), ("by_hand", "default"))
_PEERS: Final = ("txoutbox", "pgqueuer", "faststream_outbox", "omni_box", "procrastinate")
_TURNS: Final = {
    "drain, batch 100": [*_FAST, *((peer, "fast") for peer in _PEERS), *(("ours", name) for name in DRAINING)],
    "write, 100 in a transaction": [*_FAST, *((peer, "fast") for peer in _PEERS)],
}
_DRAINS: Final = (4_000, 24_000)
_DRAINS_OF_PEERS: Final = (1_000, 4_000)
"""Messages of the two turns of draining."""
_SECONDS: Final = (2.0, 10.0)
"""Of the two turns of writing."""
_PATIENCE: Final = 300.0


async def _count(side: Running, verb: str, load: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the instructions of a new process that does nothing else, and how many messages those were for."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        valgrind = ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")
        there = await Running.start(side.key, side.dsn, under=(*valgrind, f"--log-file={log}"))
        turn = await there.ask(verb, **load)
        await there.end()
        found = re.search(r"I +refs: +([\d,]+)", log.read_text(encoding="utf-8"))
    if found is None:
        raise SideError("valgrind did not say how many")
    return int(found[1].replace(",", "")), turn.count


async def _for_a_message(side: Running, variant: str, work: str) -> float:
    turns = []
    for load in _loads(side, work):
        await side.ask("fill", messages=load.get("messages", 0), keys=0, size=300)
        verb = work.partition(",")[0]
        turns.append(await _count(side, verb, {**load, "variant": variant}))
    (few, of_few), (many, of_many) = turns
    return (many - few) / (of_many - of_few)


def _loads(side: Running, work: str) -> list[dict[str, Any]]:
    if work.startswith("write"):
        return [{"seconds": seconds, "per_transaction": 100, "connections": 1, "size": 300} for seconds in _SECONDS]
    counts = _DRAINS_OF_PEERS if is_peer(side.key) else _DRAINS
    return [{"seconds": _PATIENCE, "messages": count, "batch": 100} for count in counts]


async def measure() -> list[dict[str, Any]]:
    """Returns the figures: side, variant, work and instructions."""
    figures = []
    async with embedded.postgres(shared_buffers="256MB") as dsn:
        sides: dict[str, Running] = {}
        for work, turns in _TURNS.items():
            for key, variant in turns:
                if key not in sides:
                    sides[key] = await Running.start(key, await database(dsn, key))
                    await sides[key].ask("prepare")
                figure = await _for_a_message(sides[key], variant, work)
                figures.append({"side": sides[key].name, "variant": variant, "work": work, "instructions": figure})
                Console(stderr=True).print(f"{work}: {key}, {variant}: {figure:,.0f}", style="dim", highlight=False)
        for side in sides.values():
            await side.stop()
    return figures


def main() -> None:
    """Counts, prints, and writes the figures into docs/benchmarks and its page."""
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not installed: apt-get install --no-install-recommends valgrind")
    figures = asyncio.run(measure())
    folder = OUTPUT["full"]
    _report.instructions_file(folder).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    header, *lines = _report.instructions(folder)
    table = Table(*header)
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    _report.write(_report.read(folder / "results.json"), folder)


if __name__ == "__main__":
    main()
