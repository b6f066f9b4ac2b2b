"""NATS with JetStream, on a free port of the loopback interface."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import nats

from tests.destinations.brokers import Process, free_port, listens, program


class NatsServer(Process):
    """A server that stores its streams.

    Args:
        folder: Where it stores them.
        options: More of its options.
    """

    def __init__(self, folder: Path | str, *options: str) -> None:
        port = free_port()
        self.url = f"nats://127.0.0.1:{port}"
        command = [program("nats-server"), "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(folder), *options]
        super().__init__(command, partial(listens, port))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs it for the length of the block, with a stream that stores the topics below `orders`."""
        await self.start()
        try:
            async with await nats.connect(self.url) as client:
                await client.jetstream().add_stream(name="ORDERS", subjects=["orders.>"])
            yield
        finally:
            await self.stop()
