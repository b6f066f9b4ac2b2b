"""RabbitMQ in a folder of its own, on free ports of the loopback interface."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL
from typing import Final

import aio_pika
import anyio

from tests.destinations.brokers import free_port, listens, program
from tests.guard import guard

MEGABYTE: Final = 1024 * 1024
_PROGRAMS: Final = Path("/usr/lib/rabbitmq/bin")
_START_SECONDS = 40
_QUEUES: Final = 100


class RabbitMQServer:
    """A server that takes messages of up to a megabyte. Its start takes seconds, so it belongs to no event loop.

    Args:
        folder: Everything it writes is in there.
    """

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"amqp://127.0.0.1:{self.port}"
        self._folder = folder
        self._epmd = free_port()
        self._queues = [f"orders.{number}" for number in range(_QUEUES)]
        self._process: subprocess.Popen[bytes] | None = None
        settings = [f"listeners.tcp.1 = 127.0.0.1:{self.port}", f"max_message_size = {MEGABYTE}"]
        (folder / "rabbitmq.conf").write_text("\n".join([*settings, ""]))
        (folder / "enabled_plugins").write_text("[rabbitmq_consistent_hash_exchange].")
        self._environment = {**os.environ, **self._variables(), "HOME": str(folder)}

    def _variables(self) -> dict[str, str]:
        return {
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbitmq.conf"),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "enabled_plugins"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "mnesia"),
            "RABBITMQ_NODENAME": "outbox@localhost",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RUNNING_UNDER_SYSTEMD": "1",  # the script becomes the server, so the process is the server's own
        }

    @contextmanager
    def running(self) -> Iterator["RabbitMQServer"]:
        """Runs it, and the daemon that Erlang needs beside it, and ends both."""
        command = [*guard("KILL"), program("epmd"), "-port", str(self._epmd), "-address", "127.0.0.1"]
        with subprocess.Popen(command, stdout=DEVNULL, stderr=DEVNULL, stdin=DEVNULL) as epmd:
            try:
                asyncio.run(self._prepare())
                yield self
            finally:
                self._kill()
                epmd.kill()

    async def _prepare(self) -> None:
        await self.start()
        async with await aio_pika.connect(self.url) as client:
            channel = await client.channel()
            for name in self._queues:
                await channel.declare_queue(name, durable=True)
        # It says that a queue is there before that is on disk: killed within the second, it would know it no more.
        await self.control("eval", "mnesia:sync_log().")

    def queue(self) -> str:
        """Returns the name of a durable queue that nobody else uses, and that outlives a kill."""
        return self._queues.pop()

    async def start(self) -> None:
        """Starts it, and waits until it answers."""
        command = [*guard("KILL"), str(_PROGRAMS / "rabbitmq-server")]
        self._process = subprocess.Popen(  # noqa: ASYNC220 -- one of asyncio would belong to the loop of one test
            command, stdout=DEVNULL, stderr=DEVNULL, stdin=DEVNULL, env=self._environment
        )
        with anyio.fail_after(_START_SECONDS):
            await listens(self.port)
        assert self._process.poll() is None, f"RabbitMQ ended with {self._process.returncode}"

    async def stop(self) -> None:
        """Kills it."""
        self._kill()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        assert self._process
        self._process.send_signal(number)

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process
        return self._process.pid

    async def control(self, *arguments: str) -> None:
        """Runs `rabbitmqctl`."""
        process = await asyncio.create_subprocess_exec(
            str(_PROGRAMS / "rabbitmqctl"), *arguments, stdout=DEVNULL, stderr=DEVNULL, env=self._environment
        )
        assert await process.wait() == 0, arguments
