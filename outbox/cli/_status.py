"""`outbox status`: how many messages there are, and which relays live."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Final

from rich.console import Console, Group
from rich.text import Text

from outbox._doctor import duration
from outbox._outbox import Connection, Counts, Outbox
from outbox._queries import OperatorQueries
from outbox.cli._console import console, print_json, printable, table_of
from outbox.cli._database import Database
from outbox.cli._settings import Duration

_DATABASE: Final = Database()
_TOPICS: Final = 10
"""So many topics with dead letters are shown."""


@dataclass(frozen=True, slots=True)
class Status:
    """What there is at one moment."""

    outbox: str
    counts: Counts
    relays: Sequence[Mapping[str, Any]]
    dead_by_topic: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """The same for programs; lengths of time in seconds."""
        counts = asdict(self.counts)
        oldest = counts.pop("oldest")
        return {
            "outbox": self.outbox,
            **counts,
            "oldest_seconds": oldest.total_seconds() if oldest is not None else None,
            "relays": [_relay_as_json(relay) for relay in self.relays],
            "dead_by_topic": dict(self.dead_by_topic),
        }

    def as_text(self) -> Group:
        """The same for people."""
        return Group(
            Text(self.outbox, style="bold"),
            Text(),
            _figures(self.counts),
            Text(),
            _relays(self.relays),
            *_dead(self.dead_by_topic),
        )


async def status(
    *,
    database: Database = _DATABASE,
    watch: bool = False,
    interval: Duration = timedelta(seconds=2),
    json: bool = False,
) -> None:
    """Show how many messages there are, the relays and the dead letters.

    It counts the whole table.

    Args:
        database: Where.
        watch: Show it again and again, until Ctrl-C.
        interval: How often, with --watch.
        json: For programs; with --watch a line each time.
    """
    out = console()
    async with database.connected() as connection:
        if not watch:
            _show(out, await read(connection, database.outbox), json=json)
        elif json or not out.is_terminal or out.is_dumb_terminal:
            while True:
                _show(out, await read(connection, database.outbox), json=json, indent=None)
                await asyncio.sleep(interval.total_seconds())
        else:
            await _watch(out, connection, database.outbox, interval)


async def read(connection: Connection, outbox: Outbox) -> Status:
    """Reads all of it in one snapshot."""
    queries = OperatorQueries(outbox._queries)
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        counts = await outbox.counts(connection)
        relays = [dict(row) for row in await connection.fetch(queries.relays)]
        dead = {row["topic"]: row["dead"] for row in await connection.fetch(queries.dead_by_topic)}
    return Status(f"{outbox.schema}.{outbox.table}", counts, relays, dead)


def _show(out: Console, status: Status, *, json: bool, indent: int | None = 2) -> None:
    if json:
        print_json(status.as_json(), indent=indent)
    else:
        out.print(status.as_text())


async def _watch(out: Console, connection: Connection, outbox: Outbox, interval: timedelta) -> None:
    from rich.live import Live  # noqa: PLC0415 -- of no use to the other commands, and slow to import

    footer = Text(f"every {interval.total_seconds():g} s, Ctrl-C ends it", style="dim")
    with Live(console=out, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            shown = (await read(connection, outbox)).as_text()
            live.update(Group(shown, Text(), footer), refresh=True)
            await asyncio.sleep(interval.total_seconds())


def _figures(counts: Counts) -> Group:
    oldest = "nothing is due" if counts.oldest is None else f"the oldest has waited {duration(counts.oldest)}"
    lines = [
        ("pending", counts.pending, oldest),
        ("  waiting", counts.waiting, "for their time, or their next attempt"),
        ("dispatched", counts.dispatched, "and kept"),
        ("dead", counts.dead, "`outbox dead list`" if counts.dead else ""),
    ]
    return Group(
        *(
            Text.assemble(
                f"{name:<12}",
                (f"{count:>13,}", "bold red" if name == "dead" and count else "bold"),
                (f"  {note}" if count or name == "pending" else "", "dim"),
            )
            for name, count, note in lines
        )
    )


def _relays(relays: Sequence[Mapping[str, Any]]) -> Any:
    if not relays:
        return Text("no relay is alive", style="red")
    rows = [
        {
            "relay": str(relay["owner"])[:8],
            "order": relay["ordering"],
            "state": _state(relay),
            "since": duration(relay["age"]),
            "claimed": f"{relay['claimed']:,}",
            "slots": "" if relay["ordering"] == "none" else str(relay["slots"]),
        }
        for relay in relays
    ]
    right = {"justify": "right"}
    return table_of(rows, relay={}, order={}, state={}, since=right, claimed=right, slots=right)


def _state(relay: Mapping[str, Any]) -> Text:
    if relay["lease"] <= timedelta():
        return Text("dead", style="red")
    return Text("at work", style="green") if relay["active"] else Text("stands by", style="yellow")


def _dead(by_topic: Mapping[str, int]) -> list[Any]:
    if not by_topic:
        return []
    rows = [{"dead": f"{dead:,}", "topic": printable(topic)} for topic, dead in list(by_topic.items())[:_TOPICS]]
    cropped = {"no_wrap": True, "overflow": "ellipsis"}
    more = len(by_topic) - _TOPICS
    note = [Text(f"and {more} topics more", style="dim")] if more > 0 else []
    return [Text(), table_of(rows, dead={"justify": "right"}, topic=cropped), *note]


def _relay_as_json(relay: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "owner": str(relay["owner"]),
        "order": relay["ordering"],
        "active": relay["active"],
        "lease_seconds": relay["lease"].total_seconds(),
        "age_seconds": relay["age"].total_seconds(),
        "claimed": relay["claimed"],
        "slots": relay["slots"],
    }
