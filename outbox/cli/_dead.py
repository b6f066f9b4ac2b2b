"""`outbox dead`: the messages that were given up."""

import json as json_
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from cyclopts import Parameter
from rich.text import Text

from outbox._doctor import duration
from outbox._outbox import Connection, DeadLetter, Outbox
from outbox._queries import OperatorQueries
from outbox.cli._console import console, print_json, printable, say
from outbox.cli._database import Database
from outbox.cli._failures import FOUND, fail
from outbox.cli._settings import Count, Duration

_DATABASE: Final = Database()
_SHOWN: Final = ("id", "topic", "key", "attempts", "error", "died_at", "behind")
_DONE: Final = {"redrive": "redriven", "discard": "discarded"}


@Parameter(name="*", group="Which")
@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which dead letters: those for which all of it is true."""

    topic: Annotated[str | None, Parameter(help="Of this topic.")] = None
    key: Annotated[str | None, Parameter(help="Of this key.")] = None
    error: Annotated[str | None, Parameter(help="With this text in their error, in any case.")] = None
    older_than: Annotated[Duration | None, Parameter(help="Given up longer ago than this: 30m, 2d.")] = None
    newer_than: Annotated[Duration | None, Parameter(help="Given up since: 1h.")] = None

    async def find(
        self, connection: Connection, outbox: Outbox, ids: Sequence[UUID], limit: int | None
    ) -> list[Mapping[str, Any]]:
        """Returns what is known of them, without their bodies."""
        return await connection.fetch(
            OperatorQueries(outbox._queries).find_dead,
            list(ids) or None,
            self.topic,
            self.key,
            self.error,
            self.older_than,
            self.newer_than,
            limit,
        )


_ANY: Final = Filters()


async def list_(
    *ids: UUID,
    database: Database = _DATABASE,
    filters: Filters = _ANY,
    limit: Count = 100,
    json: bool = False,
) -> None:
    """List dead letters, the lowest position first.

    Args:
        ids: Only these.
        database: Where.
        filters: Which.
        limit: At most so many.
        json: For programs.
    """
    async with database.connected() as connection:
        found = await filters.find(connection, database.outbox, ids, limit + 1)
    letters = found[:limit]
    if json:
        print_json([{name: row[name] for name in _SHOWN} for row in letters])
    elif letters:
        _print_list(letters)
    else:
        say("no dead letter")
    if len(found) > limit:
        say(f"there are more than these {limit:,}: --limit shows more")


async def show(id: UUID, /, *, database: Database = _DATABASE, json: bool = False) -> int:  # noqa: A002 -- the field's word
    """Show all of a dead letter: headers, body and error.

    Args:
        id: Its id.
        database: Where.
        json: For programs.
    """
    async with database.connected() as connection:
        letters = await database.outbox.dead_letters(connection, [id])
    if not letters:
        fail(f"no dead letter has the id {id}", FOUND)
    if json:
        print_json([_as_json(letter) for letter in letters])
    else:
        for letter in letters:
            _print(_as_json(letter))
    return 0


async def redrive(
    *ids: UUID,
    database: Database = _DATABASE,
    filters: Filters = _ANY,
    everything: Annotated[bool, Parameter(name="--all")] = False,
    yes: bool = False,
) -> int:
    """Send dead letters on their way again, in order, with all attempts before them.

    One that parked its key takes those along that were parked behind it.

    Args:
        ids: These; without any, a filter or --all must say which.
        database: Where.
        filters: Which.
        everything: All there are.
        yes: Do not ask.
    """
    return await _act("redrive", database, ids, filters, everything=everything, yes=yes)


async def discard(
    *ids: UUID,
    database: Database = _DATABASE,
    filters: Filters = _ANY,
    everything: Annotated[bool, Parameter(name="--all")] = False,
    yes: bool = False,
) -> int:
    """Delete dead letters, for ever.

    Those that were parked behind one of them are delivered.

    Args:
        ids: These; without any, a filter or --all must say which.
        database: Where.
        filters: Which.
        everything: All there are.
        yes: Do not ask.
    """
    return await _act("discard", database, ids, filters, everything=everything, yes=yes)


async def _act(
    verb: Literal["redrive", "discard"],
    database: Database,
    ids: Sequence[UUID],
    filters: Filters,
    *,
    everything: bool,
    yes: bool,
) -> int:
    outbox = database.outbox
    async with database.connected() as connection:
        chosen = await _choose(connection, outbox, ids, filters, everything=everything)
    if not yes:
        _confirm(verb, len(chosen))
    # Connected anew, since the answer may have taken a night.
    async with database.connected() as connection:
        act = outbox.redrive if verb == "redrive" else outbox.discard
        count = await act(connection, chosen)
    say(f"{count:,} {_DONE[verb]}")
    missing = [one for one in ids if one not in set(chosen)]
    for one in missing:
        say(f"no dead letter has the id {one}, or it does not match")
    return FOUND if missing else 0


async def _choose(
    connection: Connection, outbox: Outbox, ids: Sequence[UUID], filters: Filters, *, everything: bool
) -> list[UUID]:
    """Returns the ids of those that are meant and are there."""
    if not ids and filters == _ANY and not everything:
        fail("say which: ids, a filter such as --topic, or --all")
    if everything and (ids or filters != _ANY):
        fail("--all means all of them: without ids and filters")
    return [row["id"] for row in await filters.find(connection, outbox, ids, None)]


def _confirm(verb: str, count: int) -> None:
    """Asks before something is done to many."""
    if count <= 1:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        fail(f"this would {verb} {count:,} dead letters, and nobody is here to confirm it: say --yes")
    sys.stderr.write(f"{verb} {count:,} dead letters? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        fail(f"not confirmed: 0 {_DONE[verb]}", FOUND)


def _print_list(letters: Sequence[Mapping[str, Any]]) -> None:
    out = console()
    for row in letters:
        key = f"  key {row['key']}" if row["key"] is not None else ""
        line = f"{row['id']}  {_age(row['age'])} ago  {row['topic']}{key}"
        for text in (printable(line), Text("  ").append_text(printable(row["error"]))):
            out.print(text, no_wrap=True, overflow="ellipsis")


def _age(age: timedelta) -> str:
    count, unit, *_ = duration(age).split()
    return f"{float(count):.0f} {unit}"


def _as_json(letter: DeadLetter) -> dict[str, Any]:
    message = letter.message
    try:
        body, encoding = message.body.decode(), "utf-8"
    except UnicodeDecodeError:
        body, encoding = message.body.hex(), "hex"
    return {
        "id": message.id,
        "position": message.position,
        "topic": message.topic,
        "key": message.key,
        "headers": dict(message.headers),
        "recorded_at": message.recorded_at,
        "died_at": letter.died_at,
        "attempts": letter.attempts,
        "error": letter.error,
        "behind": letter.behind,
        "body": body,
        "body_encoding": encoding,
    }


def _print(letter: dict[str, Any]) -> None:
    out = console()
    body, headers = letter.pop("body"), letter.pop("headers")
    del letter["body_encoding"]
    for name, value in letter.items():
        if value is not None:
            out.print(Text.assemble((f"{name:<12}", "bold"), printable(str(value))), soft_wrap=True)
    for name, value in headers.items():
        out.print(Text.assemble(("header      ", "bold"), printable(f"{name}: {value}")), soft_wrap=True)
    out.print()
    out.print(printable(_indented(body), lines=True), soft_wrap=True)


def _indented(body: str) -> str:
    try:
        return json_.dumps(json_.loads(body), indent=2, ensure_ascii=False)
    except ValueError:
        return body
