"""SQS and SNS for the tests: the server of moto, an emulator and nothing more.

It shows that requests, limits and answers are what botocore's models say, not how AWS behaves under load or in failure.
It keeps everything in memory, so it is never killed: what dies, and comes back, is the way to it. Nobody can kill AWS
either. It is frozen as any process is.
"""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from signal import SIGCONT, SIGSTOP
from typing import Any
from unittest import SkipTest

from aiobotocore.config import AioConfig  # type: ignore[import-untyped]
from aiobotocore.session import get_session  # type: ignore[import-untyped]

from outbox import Message
from outbox.destinations import sqs
from outbox.testing import Broker, Case
from tests.destinations.brokers import free_port, frozen, listens
from tests.faults import FaultProxy
from tests.guard import guard

# Each request counts the visible messages of its queue, and each count asks each message for the time, which takes moto
# eight microseconds: with a thousand messages it would be the clock that is tested. This one is the same, and fast.
# And to delete is to leave out of a copy: what another thread adds to the queue meanwhile would be lost.
_SERVER = """
import sys, time
import moto.sqs.models
from moto.server import main
from moto.sqs.models import Queue
moto.sqs.models.unix_time_millis = lambda: time.time() * 1000
delete = Queue.delete_message
def delete_alone(queue, handle):
    with queue._messages_lock:  # which whoever adds a message holds
        delete(queue, handle)
Queue.delete_message = delete_alone
main(sys.argv[1:])
"""


class Emulator:
    """The process of moto, for all tests of a module."""

    def __init__(self) -> None:
        self.port = free_port()
        command = [*guard("KILL"), sys.executable, "-c", _SERVER, "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def client(self, service: str, port: int | None = None) -> AbstractAsyncContextManager[Any]:
        """Makes one that never tries again or, straight to the emulator, does: its threads stumble over each other."""
        attempts = 1 if port else 5
        client: AbstractAsyncContextManager[Any] = get_session().create_client(
            service,
            region_name="eu-central-1",
            endpoint_url=f"http://127.0.0.1:{port or self.port}",
            aws_access_key_id="none",
            aws_secret_access_key="none",  # noqa: S106 -- the emulator asks for none
            config=AioConfig(retries={"total_max_attempts": attempts}, max_pool_connections=40),
        )
        return client


@contextmanager
def emulator() -> Iterator[Emulator]:
    emulator = Emulator()
    try:
        asyncio.run(asyncio.wait_for(listens(emulator.port), 30))
        yield emulator
    finally:
        emulator.process.kill()
        emulator.process.wait()


class Way(FaultProxy):
    """The way to the emulator, which can be closed, so that connections are refused, and opened again."""

    async def close(self) -> None:
        self._closed_port = self.port
        self._listener.close()
        self.reset()

    async def open(self) -> None:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self._closed_port)


class AwsBroker(Broker):
    """What SQS and SNS have in common: a queue that is read all the time, and a way to the emulator for the client."""

    def __init__(self, emulator: Emulator, way: Way, client: Any, queue: str) -> None:
        self.emulator = emulator
        self.way = way
        self.client = client
        self.queue = queue
        self.raws: list[dict[str, Any]] = []
        self._arrived: list[Message] = []
        self._news = asyncio.Condition()

    def message(self, raw: Mapping[str, Any]) -> Message:
        return sqs.received(raw)

    async def received(self, count: int) -> Sequence[Message]:
        async with self._news:
            await self._news.wait_for(lambda: len(self._arrived) >= count)
        return self._arrived

    async def read(self, reader: Any) -> None:
        """Reads the queue, so that it never grows long, which the emulator cannot bear."""
        queue, handles = {"QueueUrl": self.queue}, "ReceiptHandle"
        while True:
            answer = await reader.receive_message(
                **queue,
                MaxNumberOfMessages=10,
                WaitTimeSeconds=1,
                MessageAttributeNames=["All"],
                AttributeNames=["All"],
            )
            if raws := answer.get("Messages", []):
                async with self._news:
                    self.raws += raws
                    self._arrived += map(self.message, raws)
                    self._news.notify_all()
                done = [{"Id": str(number), handles: raw[handles]} for number, raw in enumerate(raws)]
                await reader.delete_message_batch(**queue, Entries=done)

    async def stop(self) -> None:
        await self.way.close()

    async def start(self) -> None:
        await self.way.open()

    async def freeze(self) -> None:
        self.emulator.process.send_signal(SIGSTOP)
        await frozen(self.emulator.process.pid)

    async def thaw(self) -> None:
        self.emulator.process.send_signal(SIGCONT)


@asynccontextmanager
async def reading(broker: AwsBroker, reader: Any) -> AsyncIterator[None]:
    """Reads what arrives: a FIFO queue in one task, since two threads of the emulator may take of the same group."""
    readers = [asyncio.create_task(broker.read(reader)) for _ in range(1 if broker.queue.endswith(".fifo") else 2)]
    yield
    for task in readers:
        task.cancel()
    await asyncio.wait(readers)
    assert all(task.cancelled() for task in readers), [task.exception() for task in readers if not task.cancelled()]


async def new_queue(client: Any, name: str) -> str:
    """Makes a queue, FIFO by its name, and returns its URL."""
    attributes = {"FifoQueue": "true"} if name.endswith(".fifo") else {}
    url: str = (await client.create_queue(QueueName=name, Attributes=attributes))["QueueUrl"]
    return url


async def run(case: Case, broker: AwsBroker) -> None:
    if "ten_thousand" in case.__name__:
        raise SkipTest("the emulator takes a few hundred messages a second: see the whole way, with a thousand")
    await case(broker)
