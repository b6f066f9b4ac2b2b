"""Redis Streams, through redis-py."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import anyio

from outbox._codec import Codec
from outbox._errors import DestinationUnavailableError, describe, needs
from outbox._message import _RECEIVED, Message
from outbox.destinations._answers import caused, require_body_within, send_fitting
from outbox.destinations._envelope import PREFIX, TOPIC, pack, reading, unpack

with needs("redis"):
    from redis import exceptions

if TYPE_CHECKING:
    from redis.asyncio import Redis

BODY: Final = f"{PREFIX}body"
"""The field of the body; the others are named by the headers."""

_DOWN: Final = (
    exceptions.ConnectionError,  # a server that loads its data is one
    exceptions.TimeoutError,
    exceptions.ClusterDownError,
    exceptions.MasterDownError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,  # a replica, in the middle of a failover
    exceptions.TryAgainError,
    OSError,
    TimeoutError,
)
# The client has no class for these: a script that goes on and on, a disk that is full, too few replicas.
_DOWN_PREFIXES: Final = ("BUSY ", "MISCONF ", "NOREPLICAS ")
_PROBE_SECONDS: Final = 1


class RedisDispatcher:
    """Appends to streams, the topic as the stream's name: one XADD for each message, all in one pipeline.

    What Redis acknowledges is as safe as its own settings make it: `appendfsync always` survives a crash, and
    `everysec`, its default, may lose a second.

    Args:
        client: A client, which connects by itself and stays yours to close.
        max_length: About how long a stream may grow (`MAXLEN ~`). Older entries go, whether somebody has read them
            or not; None keeps them all.
        max_body: The largest body that is sent, in bytes. Redis cuts the connection, and with it the whole batch, at
            its `proto-max-bulk-len`.
        timeout: How long a batch may take; after that Redis counts as unavailable.
    """

    def __init__(
        self,
        client: "Redis",
        *,
        max_length: int | None = None,
        max_body: int = 512 * 1024 * 1024,
        timeout: timedelta = timedelta(seconds=10),
    ) -> None:
        self._client = client
        self._max_length = max_length
        self._max_body = max_body
        self._timeout = timeout.total_seconds()

    async def dispatch(self, *messages: Message) -> None:
        """Appends the messages in their order, and reads the answer to each.

        Raises:
            PartialDispatchError: With the error of each message that was not appended.
            DestinationUnavailableError: When Redis does not answer; some may have been appended.
        """
        await send_fitting(messages, self._entry, self._append, _sort)

    def _entry(self, message: Message) -> tuple[str, dict[Any, Any]]:
        """Returns the stream, and what is appended to it."""
        require_body_within(message, self._max_body)
        return message.topic, {**pack(message, TOPIC), BODY: message.body}

    async def _append(self, entries: Sequence[tuple[str, dict[Any, Any]]]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for stream, entry in entries:
            _ = pipeline.xadd(stream, entry, maxlen=self._max_length)  # its answer comes with all the others
        try:
            with anyio.fail_after(self._timeout):
                return await pipeline.execute(raise_on_error=False)
        except _DOWN as error:
            if await self._is_well():  # it is what was sent: something beyond the server's limits, for one
                raise
            raise _sort(error) from error

    async def _is_well(self) -> bool:
        with anyio.move_on_after(_PROBE_SECONDS), suppress(*_DOWN):
            return bool(await self._client.ping())
        return False


def _sort(error: BaseException) -> BaseException:
    if isinstance(error, _DOWN) or str(error).startswith(_DOWN_PREFIXES):
        return caused(DestinationUnavailableError(f"Redis does not answer: {describe(error)}"), error)
    return error


@reading()
def received(stream: str | bytes, fields: Mapping[bytes, bytes], codec: Codec = _RECEIVED) -> Message:
    """Makes the message that was dispatched of a stream's entry, read by a client that does not decode responses.

    Raises:
        ValueError: When it was not sent by this library.
    """
    headers = {name.decode(): value.decode() for name, value in fields.items() if name != BODY.encode()}
    topic = stream if isinstance(stream, str) else stream.decode()
    return unpack(fields.get(BODY.encode(), b""), headers | {TOPIC: topic}, codec)
