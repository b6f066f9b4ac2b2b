"""The probes of a relay over HTTP: /live and /ready, and nothing else."""

import asyncio
import json
from asyncio import StreamReader, StreamWriter
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from http import HTTPStatus
from typing import Final, Self

import anyio
from anyio.abc import TaskStatus

from outbox._relay import Relay
from outbox.cli._failures import fail

_REQUEST_SECONDS: Final = 5.0
_LAST_PORT: Final = 65_535


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads HOST:PORT, or PORT alone, which is of 127.0.0.1."""
        host, _, port = text.rpartition(":")
        if not (port.isascii() and port.isdecimal() and int(port) <= _LAST_PORT):
            fail(f"{text!r} is not HOST:PORT, as in 127.0.0.1:8080")
        return cls(host.strip("[]") or "127.0.0.1", int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


async def serve_probes(
    relay: Relay, address: Address, max_age: timedelta, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """Serves until it is cancelled."""
    answer = partial(_answer, relay, max_age)
    try:
        server = await asyncio.start_server(answer, address.host, address.port)
    except OSError as error:
        fail(f"cannot listen on {address}: {error.strerror or error}")
    try:
        task_status.started()
        await anyio.sleep_forever()
    finally:
        server.close()


async def _answer(relay: Relay, max_age: timedelta, reader: StreamReader, writer: StreamWriter) -> None:
    """Answers one request, and closes the connection."""
    try:
        async with asyncio.timeout(_REQUEST_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
            status, body = await _respond(relay, max_age, head)
            writer.write(
                f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n".encode()
            )
            writer.write(body if not head.startswith(b"HEAD ") else b"")
            await writer.drain()
    except (OSError, EOFError, asyncio.LimitOverrunError):  # of whoever asked; TimeoutError is an OSError
        pass
    finally:
        writer.close()


async def _respond(relay: Relay, max_age: timedelta, head: bytes) -> tuple[HTTPStatus, bytes]:
    method, _, rest = head.decode("latin-1").partition(" ")
    path = rest.partition(" ")[0].partition("?")[0]
    if path not in {"/live", "/ready"}:
        return HTTPStatus.NOT_FOUND, b'{"problems": ["there are /live and /ready"]}\n'
    if method not in {"GET", "HEAD"}:
        return HTTPStatus.METHOD_NOT_ALLOWED, b'{"problems": ["only GET and HEAD"]}\n'
    health = await relay.health(max_age=max_age)
    is_well = health.alive if path == "/live" else health.ready
    answer = {
        "alive": health.alive,
        "ready": health.ready,
        "oldest_seconds": None if health.oldest is None else health.oldest.total_seconds(),
        "problems": health.problems,
    }
    return HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE, json.dumps(answer).encode() + b"\n"
