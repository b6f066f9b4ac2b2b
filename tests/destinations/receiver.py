"""A receiver of webhooks in a process of its own: it answers 202 when a request is on disk.

It serves HTTP/1.1, and over TLS also HTTP/2. What it was sent decides what it answers, see `answer`; besides, `/drip`
gives a byte of its head now and then, `/flood` a body without end, and `/stall` none of the body that it promised.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
import sys
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from pathlib import Path

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded

LARGEST = 1024 * 1024
ENDLESS = 10**12

Headers = dict[str, str]
Answer = tuple[int, Headers, bytes]


class Store:
    """Appends lines to a file; those who wait at the same time share one fsync."""

    def __init__(self, path: Path) -> None:
        whole = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        path.write_bytes(whole[0] + whole[1])  # without the line in the middle of which it was killed
        self._file = path.open("ab")
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._work = asyncio.Event()

    async def append(self, line: bytes) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((line, future))
        self._work.set()
        await future

    async def run(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            waiting, self._waiting = self._waiting, []
            self._file.write(b"".join(line for line, _ in waiting))
            self._file.flush()
            await asyncio.to_thread(os.fsync, self._file.fileno())
            for _, future in waiting:
                if not future.done():
                    future.set_result(None)


async def answer(store: Store, path: str, headers: Headers, body: bytes, version: str) -> Answer:
    """Answers by the path: `/status/503`, `/redirect/307/<where>`, or `/`, where the topic must be known."""
    what, _, more = path.removeprefix("/").partition("/")
    if what == "status":
        return int(more), {"retry-after": headers.get("x-ask", "")}, b"because I say so\0"
    if what == "redirect":
        status, _, where = more.partition("/")
        return int(status), {"location": where}, b""
    if what not in {"", "flood", "stall"} or headers.get("ce-type") == "nobody":
        return 404, {}, b"nobody takes this"
    if headers.get("ce-type") == "crashes":
        raise ConnectionAbortedError
    if headers.get("ce-type") == "hangs":
        await asyncio.Event().wait()
    if len(body) > LARGEST:
        return 413, {}, b""
    line = {"path": path, "version": version, "headers": headers, "body": base64.b64encode(body).decode()}
    await store.append(json.dumps(line).encode() + b"\n")
    return 202, {}, b""


async def serve(store: Store, reader: StreamReader, writer: StreamWriter) -> None:
    tls: ssl.SSLObject | None = writer.get_extra_info("ssl_object")
    is_http2 = tls is not None and tls.selected_alpn_protocol() == "h2"
    try:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await (serve_http2 if is_http2 else serve_http1)(store, reader, writer)
    finally:
        writer.close()


async def serve_http1(store: Store, reader: StreamReader, writer: StreamWriter) -> None:
    while True:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("ascii").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path = first.split()[1]
        if path == "/drip":
            await drip(writer)
        status, more, text = await answer(store, path, headers, body, "HTTP/1.1")
        more["content-length"] = str(ENDLESS if path in {"/flood", "/stall"} else len(text))
        lines = [f"HTTP/1.1 {status} -", *(f"{name}: {value}" for name, value in more.items()), "", ""]
        writer.write("\r\n".join(lines).encode() + text)
        await writer.drain()
        while path == "/flood":
            writer.write(b"x" * 65536)
            await writer.drain()


async def drip(writer: StreamWriter) -> None:
    """Gives a byte of a header now and then, and never an end."""
    writer.write(b"HTTP/1.1 202 -\r\nx-long: ")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)  # why a sleep: it is the fault itself


async def serve_http2(store: Store, reader: StreamReader, writer: StreamWriter) -> None:
    connection = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
    connection.initiate_connection()
    requests: dict[int, tuple[Headers, bytearray]] = {}

    async def respond(stream: int, headers: Headers, body: bytes) -> None:
        own = {name: value for name, value in headers.items() if not name.startswith(":")}
        status, more, text = await answer(store, headers[":path"], own, body, "HTTP/2")
        connection.send_headers(stream, [(":status", str(status)), *more.items()], end_stream=not text)
        if text:
            connection.send_data(stream, text, end_stream=True)
        writer.write(connection.data_to_send())

    async with asyncio.TaskGroup() as tasks:
        writer.write(connection.data_to_send())
        while data := await reader.read(65536):
            for event in connection.receive_data(data):
                if isinstance(event, RequestReceived):
                    requests[event.stream_id] = ({str(name): str(value) for name, value in event.headers}, bytearray())
                elif isinstance(event, DataReceived):
                    requests[event.stream_id][1].extend(event.data)
                    connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, StreamEnded):
                    headers, body = requests.pop(event.stream_id)
                    tasks.create_task(respond(event.stream_id, headers, bytes(body)))
            writer.write(connection.data_to_send())


async def main(port: str, path: str, certificate: str = "", key: str = "") -> None:
    store = Store(Path(path))
    tls = None
    if certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate, key)
        tls.set_alpn_protocols(["h2", "http/1.1"])

    async def accept(reader: StreamReader, writer: StreamWriter) -> None:
        await serve(store, reader, writer)

    async with await asyncio.start_server(accept, "127.0.0.1", int(port), ssl=tls):
        await store.run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
