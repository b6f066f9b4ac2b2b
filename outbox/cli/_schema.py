"""`outbox migrate`, `outbox schema` and `outbox cleanup`: the tables."""

import sys
from typing import Final

from outbox.cli._console import say
from outbox.cli._database import Database, Table
from outbox.cli._settings import Duration

_DATABASE: Final = Database()
_TABLE: Final = Table()
_AT_ONCE: Final = 10_000


async def migrate(*, database: Database = _DATABASE) -> None:
    """Create the tables, or upgrade them."""
    async with database.connected(check=False) as connection:
        version = await database.outbox.migrate(connection)
    say(f"{database.schema}.{database.table} has version {version}")


def schema(*, table: Table = _TABLE) -> None:
    """Print the SQL that `migrate` runs on an empty database.

    For those who run their migrations with a tool of their own. It asks no database.
    """
    sys.stdout.write(table.outbox.schema_sql())


async def cleanup(*, older_than: Duration, database: Database = _DATABASE) -> None:
    """Delete messages that were delivered, and kept, long enough ago.

    Only relays with CommitStrategy.MARK keep any. It never deletes one that was not delivered.

    Args:
        older_than: How long ago: 7d, 12h, 1w.
        database: Where.
    """
    total = 0
    async with database.connected() as connection:
        while deleted := await database.outbox.cleanup(connection, older_than, _AT_ONCE):
            total += deleted
    say(f"{total:,} message(s) deleted")
