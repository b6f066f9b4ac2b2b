"""Draws the plots: `python -m benchmarks._plots results.json folder`, in the environment of the report.

They have a transparent ground and colours of a middle brightness, so that they can be read on a light and on a dark
page; and neither time nor chance in them, so that a new run changes what was measured alone.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl  # type: ignore[import-not-found] # it is in the environment of the report alone
from matplotlib import pyplot as plt

from benchmarks._figures import Figures, Name

_GREY: Final = "#808080"
_COLOURS: Final = {
    "ours": "#2f81f7",
    "by_hand": "#8b949e",
    "pgbench": "#b0a47a",
    "txoutbox": "#d29922",
    "faststream_outbox": "#3fb950",
    "omni_box": "#a371f7",
    "pgqueuer": "#e5534b",
    "procrastinate": "#39a9a9",
}
_ONE: Final = "1 connection, 300 B"
_Bars = dict[str, list[float | None]]


def main(facts: Path, folder: Path) -> None:
    """Draws all of them."""
    content = json.loads(facts.read_text(encoding="utf-8"))
    figures, names = (
        Figures.from_json(content["figures"]),
        {key: side["name"] for key, side in content["sides"].items()},
    )
    mpl.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "outbox",
            "font.size": 10,
            **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], _GREY),
        }
    )
    batches = [f"batch {batch}" for batch in ("1", "10", "100", "1,000")]
    counts = [f"{count} in a transaction, {_ONE}" for count in (1, 10, 100)]
    plots = {
        "drain": _grouped(names, _best(figures, "drain", batches), batches, "drained, messages/s"),
        "write": _grouped(
            names, _best(figures, "write", counts), ["1 in a transaction", "10", "100"], "written, messages/s"
        ),
        "latency": _latency(names, figures),
        "dead": _dead(names, figures),
    }
    for name, plot in ((name, plot) for name, plot in plots.items() if plot):
        plot.savefig(
            folder / f"{name}.svg", transparent=True, bbox_inches="tight", metadata=dict.fromkeys(("Date", "Creator"))
        )


def _best(figures: Figures, group: str, works: Sequence[str]) -> _Bars:
    """Returns of each side its best variant in each work."""
    sides = dict.fromkeys(name.side for name, _ in figures.of(group))
    bars: _Bars = {}
    for side in (key for key in _COLOURS if key in sides):
        best = [figures.best(group, work, side.__eq__) for work in works]
        bars[side] = [_median(figures, name) for name in best]
    return bars


def _median(figures: Figures, name: Name | None) -> float | None:
    figure = figures.get(name) if name else None
    return figure.median if figure else None


def _grouped(names: dict[str, str], bars: _Bars, labels: Sequence[str], unit: str) -> Any:
    """Draws bars in groups; nothing when that was not measured."""
    if not bars:
        return None
    plot, axes = plt.subplots(figsize=(9, 4))
    width = 0.85 / max(1, len(bars))
    for number, (side, heights) in enumerate(bars.items()):
        places = [place + (number - (len(bars) - 1) / 2) * width for place in range(len(labels))]
        axes.bar(places, [height or 0 for height in heights], width, label=names[side], color=_COLOURS[side])
    axes.set_xticks(range(len(labels)), labels)
    axes.set_yscale("log")
    axes.set_ylim(bottom=100)
    axes.set_ylabel(unit)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _finish(axes)
    axes.legend(ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return plot


def _latency(names: dict[str, str], figures: Figures) -> Any:
    """Draws p50 and p99 of every variant, best first."""
    rows = []
    for name, _ in figures.of("latency"):
        half, most = (_median(figures, name._replace(work=f"400/s, {part}")) for part in ("p50", "p99"))
        if name.work == "400/s, p50" and half and most:
            rows.append((half, most, name))
    rows.sort(reverse=True)
    if not rows:
        return None
    plot, axes = plt.subplots(figsize=(9, 0.6 + 0.34 * len(rows)))
    places = range(len(rows))
    colours = [_COLOURS[name.side] for _, _, name in rows]
    axes.hlines(places, [half for half, _, _ in rows], [most for _, most, _ in rows], colors=colours, linewidth=2)
    axes.scatter([half for half, _, _ in rows], places, c=colours, marker="o", zorder=3)
    axes.scatter([most for _, most, _ in rows], places, c=colours, marker="|", s=120, zorder=3)
    axes.set_yticks(places, [f"{names[name.side]}, {name.variant}" for _, _, name in rows])
    axes.set_xscale("log")
    axes.set_xlabel("ms from the commit to the destination at 400 messages/s: p50 (dot) to p99 (line)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _finish(axes, axis="x")
    return plot


def _dead(names: dict[str, str], figures: Figures) -> Any:
    """Draws how fast each is beside dead rows, against its own speed without them."""
    rows = []
    for name, figure in figures.of("dead"):
        ratio = figures.ratio(name, name._replace(work="no dead rows"))
        made = _median(figures, name._replace(work="dead rows"))
        if name.work == "beside dead rows" and figure.rounds and ratio and made:
            rows.append((ratio.value, made, name.side))
    rows.sort()
    if not rows:
        return None
    plot, axes = plt.subplots(figsize=(9, 0.6 + 0.34 * len(rows)))
    axes.barh(range(len(rows)), [value for value, _, _ in rows], color=[_COLOURS[side] for _, _, side in rows])
    labels = [f"{names[side]}, {made / 1000:,.0f}k dead" for _, made, side in rows]
    axes.set_yticks(range(len(rows)), labels)
    for place, (value, _, _) in enumerate(rows):
        axes.text(value, place, f" {value:.2f}", va="center")
    axes.axvline(1, color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("speed beside dead rows under a held snapshot, 1 being that without them")
    _finish(axes, axis="x")
    return plot


def _finish(axes: Any, axis: str = "y") -> None:
    axes.grid(axis=axis, color=_GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    _hide(axes.spines[side] for side in ("top", "right"))


def _hide(spines: Iterable[Any]) -> None:
    for spine in spines:
        spine.set_visible(False)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
