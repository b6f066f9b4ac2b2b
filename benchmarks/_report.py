"""What a run leaves: tables on the terminal; JSON, Markdown and plots in a folder."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import asyncpg
from rich.console import Console
from rich.table import Table

from benchmarks import _wanted
from benchmarks._figures import OURS, Figure, Figures, Name
from benchmarks._rounds import AnySide, Plan
from benchmarks._sides import ROOT, environment

_DURABLE: Final = ("fsync", "full_page_writes", "synchronous_commit")
_PAGE: Final = Path(__file__).parent / "report.md"
_GROUPS: Final = {
    "write": "Writing",
    "wake-up": "Writing while a relay is woken",
    "drain": "Draining",
    "relays": "Several relays",
    "keys": "Keys",
    "backlog": "A backlog of a million",
    "slow": "A destination that takes its time",
    "latency": "Latency",
    "dead": "Beside dead rows",
    "steady": "Steady traffic",
    "tricks": "Without a trick",
    "memory": "Memory",
    "import": "Import",
}


@dataclass(frozen=True)
class Results:
    """A run."""

    about: dict[str, str]
    sides: dict[str, dict[str, Any]]
    figures: Figures


async def about(dsn: str, plan: Plan, at: datetime, settings: Mapping[str, str]) -> dict[str, str]:
    """Says when, on what and how it was measured."""
    connection: asyncpg.Connection[Any] = await asyncpg.connect(dsn)
    try:
        version = await connection.fetchval("SHOW server_version")
        durable = [f"{name}={await connection.fetchval(f'SHOW {name}')}" for name in _DURABLE]
    finally:
        await connection.close()
    return {
        "date": f"{at:%Y-%m-%d}",
        "form": plan.name,
        "rounds": f"{plan.rounds}, fewer where a turn takes long",
        "PostgreSQL": version,
        "settings": ", ".join([*durable, *(f"{name}={value}" for name, value in settings.items())]),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}, Python 3.13 for all sides",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # where there is no /proc
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def describe(sides: Mapping[str, AnySide], missing: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Says who took part, and who could not."""
    there = {
        key: {"name": side.name, "version": side.version, "settings": dict(side.settings)}
        for key, side in sides.items()
    }
    return there | {key: {"name": key, "version": "", "settings": {}, "missing": why} for key, why in missing.items()}


def show(results: Results) -> None:
    """Prints tables."""
    console = Console(width=170)
    for group, title in _groups(results.figures):
        header, *lines = _lines(results, group)
        table = Table(*header, title=title, title_justify="left")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    table = Table(*_WANTED, title="Minimum ratios", title_justify="left")
    for line in _wanted_lines(results.figures):
        table.add_row(*line)
    console.print(table)
    for missing in _missing(results):
        console.print(missing, style="dim", markup=False)


def write(results: Results, folder: Path) -> None:
    """Writes results.json, index.md and the plots."""
    facts = keep(results, folder)
    (folder / "index.md").write_text(page(results, folder), encoding="utf-8")
    command = [str(environment("report")), "-m", "benchmarks._plots", str(facts.resolve()), str(folder.resolve())]
    subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603 -- our own command


def keep(results: Results, folder: Path) -> Path:
    """Writes results.json alone, and returns where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"about": results.about, "sides": results.sides, "figures": results.figures.to_json()}
    facts = folder / "results.json"
    facts.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return facts


def read(facts: Path) -> Results:
    """Reads results.json."""
    content = json.loads(facts.read_text(encoding="utf-8"))
    return Results(content["about"], content["sides"], Figures.from_json(content["figures"]))


def instructions_file(folder: Path) -> Path:
    """Returns where the counts of benchmarks/instructions.py are kept."""
    return folder / "instructions.json"


def instructions(folder: Path) -> list[list[str]]:
    """Returns a header and a line for each side and variant; in brackets the ratio to this library."""
    figures: list[dict[str, Any]] = json.loads(instructions_file(folder).read_text(encoding="utf-8"))
    works = list(dict.fromkeys(figure["work"] for figure in figures))
    of = {(one["side"], one["variant"], one["work"]): one["instructions"] for one in figures}
    lines = [["side", "variant", *works]]
    for side, variant in dict.fromkeys((figure["side"], figure["variant"]) for figure in figures):
        cells = []
        for work in works:
            figure, ours = of.get((side, variant, work)), of["outbox", "default", work]
            cells.append("" if figure is None else f"{figure:,.0f} ({figure / ours:.2f})")
        lines.append([side, variant, *cells])
    return lines


def page(results: Results, folder: Path) -> str:
    """Returns the page, in Markdown."""
    wanted = [list(_WANTED), *_wanted_lines(results.figures)]
    parts = {
        "about": "\n".join(f"- {what}: {value}" for what, value in results.about.items()),
        "wanted": _table(wanted),
        "sides": "\n".join(_sides(results)),
    }
    for group in _GROUPS:
        lines = _lines(results, group)
        parts[group] = _table(lines) if lines[1:] else "Not measured in this run."
    counted = instructions_file(folder).exists()
    parts["instructions"] = _table(instructions(folder)) if counted else "Not counted: `make bench-instructions`."
    parts["missing"] = "\n".join(f"- {line}" for line in _missing(results)) or "Nothing."
    text = _PAGE.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"{{{{ {name} }}}}", part)
    return text


def _groups(figures: Figures) -> Iterator[tuple[str, str]]:
    return ((group, title) for group, title in _GROUPS.items() if figures.works(group))


_WANTED: Final = ("work", "against", "wanted", "measured", "spread", "met")


def _wanted_lines(figures: Figures) -> list[list[str]]:
    return [
        [row.work, row.against, row.wanted, row.measured, row.spread, "yes" if row.met else "no"]
        for row in _wanted.rows(figures)
    ]


def _lines(results: Results, group: str) -> list[list[str]]:
    """Returns a header and the medians of a group, with their ratios to the floor where it was measured as well."""
    works = results.figures.works(group)
    lines = [["side", "variant", *works]]
    for side, variant in dict.fromkeys((name.side, name.variant) for name, _ in results.figures.of(group)):
        names = [Name(group, work, side, variant) for work in works]
        lines.append([results.sides[side]["name"], variant, *(_cell(results.figures, name) for name in names)])
    return lines


def _cell(figures: Figures, name: Name) -> str:
    figure = figures.cell(name)
    if figure is None or figure.missing:
        return "" if figure is None else "none"
    floor = (OURS if name.group == "tricks" else "by_hand", "default")
    ratio = figures.ratio(name, Name(name.group, name.work, *floor))
    if ratio and (figure.unit == "messages/s" or name.group == "tricks") and name[2:] != floor:
        return f"{_number(figure)} ({ratio.value:.2f})"
    return _number(figure)


def _number(figure: Figure) -> str:
    return f"{figure.median:,.{1 if figure.unit in _FINE else 0}f}{_UNITS.get(figure.unit, '')}"


_FINE: Final = {"ms", "MB"}
_UNITS: Final = {"ms": " ms", "MB": " MB", "s": " s"}


def _missing(results: Results) -> list[str]:
    """Says why figures are missing, once for each reason."""
    works: dict[tuple[str, str], list[str]] = {}
    for group in _GROUPS:
        for name, figure in results.figures.of(group):
            if figure.missing:
                side = results.sides[name.side]["name"]
                works.setdefault((f"{side}, {name.variant}", figure.missing), []).append(name.work)
    reasons = [f"{who}: {why} ({'; '.join(of)})" for (who, why), of in works.items()]
    return reasons + [f"{side['name']}: {side['missing']}" for side in results.sides.values() if "missing" in side]


def _sides(results: Results) -> Iterator[str]:
    for side in results.sides.values():
        yield f"- **{side['name']}** {side['version']}"
        yield from (f"    - {variant}: {what}" for variant, what in side["settings"].items())


def _table(lines: Sequence[Sequence[str]]) -> str:
    header, *rest = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rest])
