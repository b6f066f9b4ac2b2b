"""Who looks after the dead letters under chaos: notes what is parked, mends, redrives, and discards.

Each dead letter that is discarded gets a row in a table, written in the same transaction; so that table says
afterwards what was discarded, also where a COMMIT got no answer. That somebody is about to do so is in the journal
before it happens: what was parked behind it may be delivered from then on.
"""

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

import asyncpg

from outbox import Outbox
from tests.chaos_relay import MENDABLE, REJECTED, mended
from tests.chaos_writers import GONE
from tests.history.journal import Journal

_TABLE: Final = "CREATE TABLE discarded (id uuid PRIMARY KEY)"
_DEAD: Final = "SELECT id, position, topic, behind FROM outbox_dead ORDER BY position"
_DISCARDED: Final = "INSERT INTO discarded SELECT * FROM unnest($1::uuid[])"


@dataclass
class Operator:
    """An operator who looks now and then, and at the end until nothing is left.

    Args:
        dsn: Straight to the server.
        outbox: Whose dead letters these are.
        journal: Where everything is noted, and beside which the mended messages have their files.
        seed: Of all that is decided by dice.
    """

    dsn: str
    outbox: Outbox
    journal: Journal
    seed: str
    is_final: bool = False
    """Whether nothing may be left."""
    broken: list[str] = field(default_factory=list)
    _seen: set[tuple[str, int]] = field(default_factory=set)

    async def prepare(self) -> None:
        mended(self.journal.path).mkdir(exist_ok=True)
        connection = await asyncpg.connect(self.dsn)
        await connection.execute(_TABLE)
        await connection.close()

    async def run(self) -> None:
        """Looks until it is cancelled."""
        dice = random.Random(f"{self.seed}-operator")
        while True:
            await asyncio.sleep(dice.uniform(0.05, 0.5))
            with suppress(*GONE):
                connection = await asyncpg.connect(self.dsn, timeout=5)
                try:
                    await self._look(connection, dice)
                finally:
                    connection.terminate()

    async def _look(self, connection: "asyncpg.Connection[Any]", dice: random.Random) -> None:
        rows = await connection.fetch(_DEAD)
        self.note_parked(rows)
        heads = [row for row in rows if row["behind"] in {None, row["position"]} and self._cares(dice)]
        followers = [row["id"] for row in rows if row["behind"] not in {None, row["position"]}]
        for_ever = [row["id"] for row in heads if row["topic"] == REJECTED]
        for_now = [row["id"] for row in heads if row["topic"] == MENDABLE]
        if dice.random() < 0.1 and not self.is_final:  # in vain
            await self.outbox.redrive(connection, for_ever + for_now)
            return
        for name in for_now:
            (mended(self.journal.path) / str(name)).touch()
        await self.outbox.redrive(connection, for_now)
        if for_ever:
            await self._discard(connection, for_ever)
        if followers and dice.random() < 0.1:  # with whom all of their key go on
            await self.outbox.redrive(connection, [dice.choice(followers)])
        elif dice.random() < 0.03:
            await self.outbox.redrive(connection)

    def _cares(self, dice: random.Random) -> bool:
        return self.is_final or dice.random() < 0.3

    async def _discard(self, connection: "asyncpg.Connection[Any]", names: list[UUID]) -> None:
        self.journal.note("discards", messages=list(map(str, names)))
        async with connection.transaction():
            await connection.execute(_DISCARDED, names)
            count = await self.outbox.discard(connection, names)
        if count != len(names):
            self.broken.append(f"{count} dead letters were discarded, and {len(names)} were there")

    def note_parked(self, rows: list["asyncpg.Record"]) -> None:
        """Notes which dead letters stand behind another."""
        pairs = {(str(row["id"]), row["behind"]) for row in rows if row["behind"] not in {None, row["position"]}}
        if news := sorted(pairs - self._seen):
            self._seen |= pairs
            self.journal.note("parked", messages=news)
