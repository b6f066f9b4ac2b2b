"""The environments of the sides, and their processes."""

import asyncio
import json
import os
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import asyncpg

ROOT: Final = Path(__file__).parent.parent
SIDES: Final = {
    "ours": "ours",
    "by_hand": "by_hand",
    "txoutbox": "txoutbox_side",
    "faststream_outbox": "faststream_outbox_side",
    "omni_box": "omni_box_side",
    "pgqueuer": "pgqueuer_side",
    "procrastinate": "procrastinate_side",
}
"""The module of each side."""

# Not in .cache, which is emptied whenever the documentation is built.
_HOME: Final = ROOT / ".bench"
_PYTHON: Final = "3.13"
_REMEDY: Final = (
    f"the sides of the benchmark need Python {_PYTHON}: install it so that it is in the path or under pyenv, or have "
    f"uv do it, `.venv/bin/uv python install {_PYTHON}`"
)
_PATIENCE: Final = 60.0
"""Seconds beyond its own time that a call may take: a backlog of a million takes a slow side that long."""
_LINE: Final = 256 * 1024 * 1024


class SideError(Exception):
    """A side answered with an error, or not at all."""


class MissingError(SideError):
    """The package of a side cannot do what was asked."""


def environment(name: str) -> Path:
    """Returns the Python of an environment with what benchmarks/requirements says, made anew when that changed."""
    requirements = ROOT / "benchmarks" / "requirements" / f"{name}.txt"
    wanted = requirements.read_text(encoding="utf-8")
    home = _HOME / name
    python, stamp = home / "bin" / "python", home / ".requirements"
    if not python.exists() or not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"Making the environment of {name} …", file=sys.stderr, flush=True)
        _HOME.mkdir(exist_ok=True)
        (_HOME / ".gitignore").write_text("*\n", encoding="utf-8")
        try:
            _uv("venv", "--quiet", "--clear", "--python", _PYTHON, str(home))
        except subprocess.CalledProcessError as error:
            raise RuntimeError(_REMEDY) from error
        itself = ["-e", "."] if name == "ours" else []
        _uv("pip", "install", "--quiet", "--python", str(python), "-r", str(requirements), *itself)
        stamp.write_text(wanted, encoding="utf-8")
    return python


def _uv(*arguments: str) -> None:
    # pyenv keeps its Pythons where uv does not look for them. The certificates of the system: behind a company's proxy
    # uv's own are not enough.
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    path = [os.environ["PATH"], *(str(folder) for folder in sorted(pyenv.glob("versions/*/bin")))]
    variables = {"UV_SYSTEM_CERTS": "1"} | os.environ | {"PATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", "uv", *arguments]
    subprocess.run(command, cwd=ROOT, env=variables, check=True)  # noqa: S603 -- our own command


@dataclass(frozen=True, slots=True)
class Turn:
    """What one call of a side returned."""

    answer: Any
    count: int


class Running:
    """A side in a process of its own, on a database of its own."""

    def __init__(self, key: str, dsn: str, process: Process) -> None:
        self.key = key
        self.dsn = dsn
        self.pid = process.pid
        self.name = key
        self.version = ""
        self.settings: Mapping[str, str] = {}
        self._process = process

    @classmethod
    async def start(cls, key: str, dsn: str, *, under: Sequence[str] = ()) -> Self:
        """Starts the process and asks it who it is; it says what goes wrong in .bench/<side>.log.

        Args:
            key: The side.
            dsn: Of its database.
            under: A command to run it under.
        """
        python = environment(key)
        log = _HOME / f"{key}.log"
        with log.open("ab") as errors:
            command = (*under, str(python), "-m", f"benchmarks.sides.{SIDES[key]}", dsn)
            process = await asyncio.create_subprocess_exec(
                *command, cwd=ROOT, stdin=PIPE, stdout=PIPE, stderr=errors, limit=_LINE
            )
        side = cls(key, dsn, process)
        who = (await side.ask("hello")).answer
        side.name, side.version, side.settings = who["name"], who["version"], who["settings"]
        return side

    async def ask(self, verb: str, **arguments: Any) -> Turn:
        """Has it do something, and returns what it says.

        Raises:
            MissingError: When its package cannot do that.
            SideError: When it failed, died, or took much too long; in the last case it is dead then.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise SideError(f"{self.key} has no pipes")
        patience = _PATIENCE + 3 * arguments.get("seconds", 0.0)
        try:
            async with asyncio.timeout(patience):
                self._process.stdin.write(json.dumps({"do": verb, **arguments}).encode() + b"\n")
                await self._process.stdin.drain()
                line = await self._process.stdout.readline()
        except (TimeoutError, ConnectionError) as error:
            await self.stop()
            raise SideError(f"{self.key} did not answer to {verb} within {patience:.0f} s") from error
        if not line:
            raise SideError(f"{self.key} died of {verb}: see .bench/{self.key}.log")
        answer = json.loads(line)
        if "ok" in answer:
            return Turn(answer["ok"], answer.get("count", 0))
        kind, _, why = answer["error"].partition(": ")
        raise (MissingError(why) if kind == "NotImplementedError" else SideError(f"{self.key}: {answer['error']}"))

    async def sibling(self) -> Self:
        """Starts a second process on the same database."""
        return await self.start(self.key, self.dsn)

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.returncode is None

    async def end(self) -> None:
        """Has the process end by itself."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()

    async def stop(self) -> None:
        """Kills the process."""
        if self.alive:
            self._process.kill()  # it holds nothing that outlives its connections
            await self._process.wait()


async def database(dsn: str, name: str) -> str:
    """Makes a database on the server, and returns its DSN."""
    connection: asyncpg.Connection[Any] = await asyncpg.connect(dsn)
    try:
        await connection.execute(f'CREATE DATABASE "{name}"')
    finally:
        await connection.close()
    return dsn.rpartition("/")[0] + f"/{name}"
