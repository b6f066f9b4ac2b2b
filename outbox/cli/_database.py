"""Which database and which outbox a command is about."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Final

import asyncpg
from cyclopts import Group, Parameter

from outbox._outbox import DRIVER_ERRORS, Connection, Outbox
from outbox.cli._failures import AWAY, Failure, surfacing

_CONNECT_SECONDS: Final = 10.0
_CLOSE_SECONDS: Final = 2.0
_GROUP: Final = Group("Database", sort_key=9)


@Parameter(name="*", group=_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The names of an outbox."""

    table: Annotated[str, Parameter(env_var="OUTBOX_TABLE", help="Name of the outbox's table.")] = "outbox"
    schema: Annotated[str, Parameter(env_var="OUTBOX_SCHEMA", help="Name of the schema it is in.")] = "public"

    @property
    def outbox(self) -> Outbox:
        """The outbox of these names."""
        try:
            return Outbox(self.table, schema=self.schema)
        except ValueError as error:
            raise Failure(str(error)) from error


@Parameter(name="*", group=_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class Database(Table):
    """An outbox in a database."""

    dsn: Annotated[
        str | None,
        Parameter(
            env_var="OUTBOX_DSN",
            help="Connection string, postgresql://user@host/database; without it PGHOST, PGUSER, PGSERVICE … count.",
        ),
    ] = None

    @asynccontextmanager
    async def connected(self, *, check: bool = True) -> AsyncIterator[Connection]:
        """Connects for the length of the block; what fails in it becomes a line for the user.

        Args:
            check: Also that the tables are of the version this library wants.
        """
        connection = await self._connect()
        try:
            with surfacing("the database refuses"):
                if check:
                    await self.outbox.check(connection)
                yield connection
        finally:
            with suppress(*DRIVER_ERRORS, TimeoutError):
                await connection.close(timeout=_CLOSE_SECONDS)

    async def _connect(self) -> asyncpg.Connection:
        self.outbox  # noqa: B018 -- a name that cannot be is told before anybody is asked to connect
        refused = "cannot connect" if self.dsn else _UNTOLD
        with surfacing(refused):
            try:
                # No prepared statements: it may be a pooler in transaction mode.
                return await asyncpg.connect(
                    self.dsn,
                    timeout=_CONNECT_SECONDS,
                    statement_cache_size=0,
                    server_settings={"application_name": "outbox"},
                )
            except (asyncpg.exceptions.ClientConfigurationError, ValueError) as error:
                # Not in the driver's words: a connection string cut in the wrong place may show its password.
                raise Failure(_MALFORMED) from error
            except TimeoutError as error:
                raise Failure(f"{refused}: no answer within {_CONNECT_SECONDS:g} s", AWAY) from error


_UNTOLD: Final = "cannot connect (there is no --dsn and no OUTBOX_DSN, so libpq's variables and defaults count)"
_MALFORMED: Final = (
    "cannot read the connection settings: --dsn or OUTBOX_DSN is postgresql://user@host:port/database, where a "
    "password has its special characters percent-encoded; what it leaves out comes from PGHOST, PGPORT …"
)
