"""Starts the brokers, each on a free port of the loopback interface, and ends them by their process id."""

import asyncio
import os
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL
from typing import Any, Protocol

import anyio

from outbox.testing import Broker
from tests.guard import guard

_START_SECONDS = 30


def free_port() -> int:
    """Returns a port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def program(name: str) -> str:
    """Returns the path of a program that came with a package of the environment, or with the system."""
    own = Path(sys.executable).with_name(name)
    path = str(own) if own.exists() else shutil.which(name)
    assert path, f"{name} is not installed"
    return path


async def listens(port: int) -> None:
    """Waits until something accepts connections on the port."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await anyio.sleep(0.01)  # why a sleep: a port that opens has no event
        else:
            writer.close()
            return


async def frozen(pid: int) -> None:
    """Waits until a process that was sent SIGSTOP has stopped, with all of its threads."""
    while not _is_frozen(pid):  # noqa: ASYNC110 -- it has no event, but for the parent's event loop
        await anyio.sleep(0.001)  # as above


def _is_frozen(pid: int) -> bool:
    threads = Path(f"/proc/{pid}/task").glob("*/status")  # none where the system has no such files
    return all("\nState:\tT" in status.read_text() for status in threads)


class Process:
    """A server's process: it is killed, and starts again on the same port with the same files.

    Args:
        command: What to run.
        ready: Returns when it answers.
        environment: Variables over those of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        ready: Callable[[], Awaitable[Any]],
        *,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = command
        self._ready = ready
        self._environment = {**os.environ, **(environment or {})}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Starts it, and waits until it answers."""
        process = await asyncio.create_subprocess_exec(
            *guard("KILL"), *self._command, stdout=DEVNULL, stderr=DEVNULL, stdin=DEVNULL, env=self._environment
        )
        self._process = process
        with anyio.fail_after(_START_SECONDS):
            await self._ready()
        assert process.returncode is None, f"{self._command[0]} ended with {process.returncode}"

    async def stop(self) -> None:
        """Kills it."""
        process, self._process = self._process, None
        if process and process.returncode is None:
            process.kill()
            await process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        assert self._process
        self._process.send_signal(number)

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process
        return self._process.pid


class Server(Protocol):
    """What is killed, started again and frozen: a `Process`, or one that takes more than that to run."""

    async def start(self) -> None:
        """Starts it, and waits until it answers."""

    async def stop(self) -> None:
        """Kills it."""

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""

    @property
    def pid(self) -> int:
        """The process id."""


class ProcessBroker(Broker):
    """A broker that is a process of its own; give it as `process`."""

    process: Server

    async def stop(self) -> None:
        await self.process.stop()

    async def start(self) -> None:
        await self.process.start()

    async def freeze(self) -> None:
        self.process.signal(signal.SIGSTOP)
        await frozen(self.process.pid)  # what it was about to answer is answered by then

    async def thaw(self) -> None:
        self.process.signal(signal.SIGCONT)
