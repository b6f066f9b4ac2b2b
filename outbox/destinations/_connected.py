"""A connection that is made on first use, and anew when it is lost: a broker may be down when a relay starts."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Generic, Self, TypeVar

import anyio

from outbox._errors import DestinationUnavailableError, OutboxError, describe
from outbox._message import Message

T = TypeVar("T")

Connect = Callable[[], Awaitable[T]]
"""Connects to a broker, with the options of its client: `functools.partial(nats.connect, url)` for one."""


class ConnectedDispatcher(ABC, Generic[T]):
    """Connects on first use, and again when its client says that it is closed.

    Args:
        connect: Makes a connected client.
        timeout: How long one attempt to connect, or to close, may take.
    """

    def __init__(self, connect: Connect[T], *, timeout: timedelta) -> None:
        self._connect = connect
        self._timeout = timeout.total_seconds()
        self._client: T | None = None
        self._lock = asyncio.Lock()
        self._is_over = False

    @abstractmethod
    async def dispatch(self, *messages: Message) -> None:
        """Publishes the messages and awaits all acknowledgements."""

    @abstractmethod
    def _is_open(self, client: T) -> bool:
        """Says whether a client can still be used; one that reconnects by itself is open while it does."""

    @abstractmethod
    async def _close(self, client: T) -> None:
        """Closes a client."""

    async def _connected(self) -> T:
        """Returns the client, connected.

        Raises:
            DestinationUnavailableError: When the broker cannot be reached in time.
            OutboxError: When the destination was closed.
        """
        if self._client is not None and self._is_open(self._client):
            return self._client
        async with self._lock:  # several batches may be the first
            if self._client is None or not self._is_open(self._client):
                if self._is_over:
                    raise OutboxError("this destination was closed: make another one")
                await self._drop()
                try:
                    with anyio.fail_after(self._timeout):
                        self._client = await self._connect()
                except Exception as error:
                    raise DestinationUnavailableError(f"cannot connect to the broker: {describe(error)}") from error
            return self._client

    async def _drop(self) -> None:
        """Closes the client, if there is one; the next use connects anew."""
        client, self._client = self._client, None
        if client is not None:
            # It may well be broken: that is why it goes.
            with anyio.move_on_after(self._timeout, shield=True), suppress(Exception):
                await self._close(client)

    async def aclose(self) -> None:
        """Closes the connection, for good."""
        self._is_over = True
        async with self._lock:
            await self._drop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
