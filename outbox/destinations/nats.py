"""NATS JetStream, through nats-py."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Final

import anyio

from outbox._codec import Codec
from outbox._errors import DestinationUnavailableError, OutboxError, RejectedError, describe, needs
from outbox._message import _RECEIVED, Message
from outbox.destinations._answers import caused, require_accepted
from outbox.destinations._connected import Connect, ConnectedDispatcher
from outbox.destinations._envelope import ID, TOPIC, escape, pack, reading, unescape, unpack

with needs("nats"):
    import nats.errors
    import nats.js.errors
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext
    from nats.js.api import Header

_DOWN: Final = (
    nats.errors.ConnectionClosedError,
    nats.errors.ConnectionDrainingError,
    nats.errors.ConnectionReconnectingError,
    nats.errors.NoServersError,
    nats.errors.OutboundBufferLimitError,
    nats.errors.StaleConnectionError,
    nats.js.errors.ServiceUnavailableError,
    nats.js.errors.TooManyStalledMsgsError,
    OSError,
    TimeoutError,  # of which nats.errors.TimeoutError is one
)
_NEVER: Final = (nats.errors.MaxPayloadError, nats.errors.BadSubjectError, nats.errors.BadHeaderError)
_ACCOUNT_IS_FULL: Final = 10002
"""The server's code for it; it is no message's fault."""
_SUBJECT_IS_FULL: Final = "maximum messages per subject exceeded"
"""With this reason the service is unavailable for one subject only."""

_AROUND_HEADERS, _AROUND_HEADER = len("NATS/1.0\r\n\r\n"), len(": \r\n")
_LONGEST_TOPIC: Final = 4_000
"""In bytes: with the reply's subject it stands in one line of the protocol, of 4,096 bytes at most."""
_PROBE_SECONDS: Final = 1


class NatsDispatcher(ConnectedDispatcher[Client]):
    """Publishes to JetStream, the topic as the subject, and awaits the stream's acknowledgement of every message.

    A subject that no stream stores is an error. The id travels as `Nats-Msg-Id`, so that the stream itself drops a
    duplicate within its `duplicate_window`. It connects on first use and may be used by any number of tasks at once.

    Args:
        connect: Makes a connected client: `functools.partial(nats.connect, "nats://localhost:4222")`.
        timeout: How long to wait for a connection, and for the acknowledgement of a batch; after that the broker
            counts as unavailable.
    """

    def __init__(self, connect: Connect[Client], *, timeout: timedelta = timedelta(seconds=10)) -> None:
        super().__init__(connect, timeout=timeout)

    async def dispatch(self, *messages: Message) -> None:
        """Publishes the messages in their order and awaits all acknowledgements.

        Raises:
            PartialDispatchError: With the error of each message that was not stored.
            DestinationUnavailableError: When the broker cannot be reached.
        """
        if messages:
            client = await self._connected()
            stream = client.jetstream(timeout=self._timeout)
            answers: list[object] = await asyncio.gather(
                *(self._publish(stream, message, client.max_payload) for message in messages), return_exceptions=True
            )
            silent = {one.topic for one, answer in zip(messages, answers, strict=True) if _is_silence(answer)}
            astray = await _not_stored(stream, silent) if silent else {}
            answers = [
                astray.get(one.topic, answer) if _is_silence(answer) else answer
                for one, answer in zip(messages, answers, strict=True)
            ]
            require_accepted(messages, answers, _sort)

    async def _publish(self, stream: JetStreamContext, message: Message, most: int) -> None:
        headers = {escape(name): escape(value) for name, value in pack(message, ID, TOPIC).items()}
        headers[Header.MSG_ID] = str(message.id)
        require_fitting(message, headers, most)
        with anyio.fail_after(self._timeout):
            await stream.publish(message.topic, message.body, headers=headers)

    def _is_open(self, client: Client) -> bool:
        return not client.is_closed

    async def _close(self, client: Client) -> None:
        await client.close()


def require_fitting(message: Message, headers: dict[str, str], most: int) -> None:
    """Raises for what the client would send and the server cut the connection over, and with it the whole batch."""
    size = _AROUND_HEADERS + sum(len(name) + len(value) + _AROUND_HEADER for name, value in headers.items())
    if size + len(message.body) > most:
        raise RejectedError(
            f"message {message.id}: {len(message.body)} bytes and {size} of headers are beyond the server's {most}"
        )
    if len(message.topic.encode()) > _LONGEST_TOPIC:
        raise RejectedError(f"message {message.id}: the topic is longer than {_LONGEST_TOPIC} bytes")


def _is_silence(answer: object) -> bool:
    return isinstance(answer, TimeoutError)


async def _not_stored(stream: JetStreamContext, topics: Iterable[str]) -> dict[str, BaseException]:
    """Returns an error for each topic that no stream stores: somebody may listen to it who acknowledges nothing."""
    astray: dict[str, BaseException] = {}

    async def look(topic: str) -> None:
        with suppress(nats.errors.Error, OSError):
            try:
                await stream.find_stream_name_by_subject(topic)
            except nats.js.errors.NotFoundError as error:
                astray[topic] = caused(OutboxError(f"no stream stores {topic!r}, though somebody listens to it"), error)

    with anyio.move_on_after(_PROBE_SECONDS):
        await asyncio.gather(*map(look, topics))
    return astray


def _sort(error: BaseException) -> BaseException:
    if isinstance(error, nats.js.errors.APIError) and error.description == _SUBJECT_IS_FULL:
        return error
    if isinstance(error, _DOWN) or getattr(error, "err_code", None) == _ACCOUNT_IS_FULL:
        return caused(DestinationUnavailableError(f"NATS does not answer: {describe(error)}"), error)
    if isinstance(error, _NEVER):
        return caused(RejectedError(f"NATS can never take it: {describe(error)}"), error)
    return error


@reading()
def received(raw: Msg, codec: Codec = _RECEIVED) -> Message:
    """Makes the message that was dispatched of what a consumer got.

    Raises:
        ValueError: When it was not sent by this library.
    """
    headers = {unescape(name): unescape(value) for name, value in (raw.headers or {}).items()}
    native = {ID: headers.pop(Header.MSG_ID, ""), TOPIC: raw.subject}
    return unpack(raw.data, headers | native, codec)
