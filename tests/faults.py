"""A TCP proxy that stands between a client and a server and does what networks do: it delays, swallows, cuts."""

import asyncio
import socket
import struct
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


@dataclass(eq=False, slots=True)
class _Link:
    """One connection of a client, and the one behind it to the server."""

    ends: list[StreamWriter]
    lost: bool


class FaultProxy:
    """Forwards to a port of this machine, until it is told to misbehave.

    `latency` is added to each chunk in each direction, from the next chunk on.
    """

    def __init__(self, target_port: int) -> None:
        self.latency = timedelta()
        self._target_port = target_port
        self._healthy = asyncio.Event()
        self._healthy.set()
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        port: int = self._listener.sockets[0].getsockname()[1]
        return port

    def dsn(self, dsn: str) -> str:
        """Leads the same DSN through this proxy."""
        return dsn.replace(f":{urlsplit(dsn).port}/", f":{self.port}/")

    def black_hole(self) -> None:
        """No byte gets through any more, either way, on the connections there are and on new ones.

        Whoever is caught in the hole is never told: such a connection stays silent after `heal`, too.
        """
        self._healthy.clear()
        for link in self._links:
            link.lost = True

    def heal(self) -> None:
        """New connections get through. The server learns which of the lost ones their clients have closed."""
        self._healthy.set()

    def reset(self) -> None:
        """Cuts all live connections at both ends (RST), with whatever is under way."""
        for link in self._links:
            link.lost = False
            for end in link.ends:
                # Lingering for zero seconds turns the close into a reset; a socket that is closed already needs none.
                with suppress(OSError):
                    end.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                end.transport.abort()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self.reset()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._listener.wait_closed()

    def _accept(self, from_client: StreamReader, to_client: StreamWriter) -> None:
        task = asyncio.create_task(self._serve(from_client, to_client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, from_client: StreamReader, to_client: StreamWriter) -> None:
        link = _Link([to_client], lost=not self._healthy.is_set())
        self._links.add(link)
        try:
            if link.lost:
                await _swallow(from_client)
            else:
                await self._forward(link, from_client)
        except ConnectionError:
            pass  # the server is down or has cut it; the client sees a cut, too
        finally:
            self._links.discard(link)
            for end in link.ends:
                end.transport.abort()

    async def _forward(self, link: _Link, from_client: StreamReader) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target_port)
        link.ends.append(to_server)
        async with asyncio.TaskGroup() as ways:
            ways.create_task(self._pump(link, from_client, to_server))
            ways.create_task(self._pump(link, from_server, link.ends[0]))

    async def _pump(self, link: _Link, source: StreamReader, sink: StreamWriter) -> None:
        with suppress(ConnectionError):
            while chunk := await source.read(65536):
                await asyncio.sleep(self.latency.total_seconds())  # why a sleep: it is the fault itself
                if not link.lost:
                    sink.write(chunk)
                    await sink.drain()
        if link.lost:
            await self._healthy.wait()  # that one end has closed is lost, too
        sink.close()


async def _swallow(source: StreamReader) -> None:
    while await source.read(65536):
        pass
