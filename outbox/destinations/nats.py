"""NATS JetStream, through nats-py."""

import asyncio
from datetime import timedelta
from typing import Final

import anyio

from outbox._codec import Codec
from outbox._errors import DestinationUnavailableError, RejectedError, describe, needs
from outbox._message import _RECEIVED, Message
from outbox.destinations._answers import caused, require_accepted
from outbox.destinations._connected import Connect, ConnectedDispatcher
from outbox.destinations._envelope import ID, TOPIC, escape, pack, unescape, unpack

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
            stream = (await self._connected()).jetstream(timeout=self._timeout)
            answers = await asyncio.gather(
                *(self._publish(stream, message) for message in messages), return_exceptions=True
            )
            require_accepted(messages, answers, _sort)

    async def _publish(self, stream: JetStreamContext, message: Message) -> None:
        headers = {escape(name): escape(value) for name, value in pack(message, ID, TOPIC).items()}
        with anyio.fail_after(self._timeout):
            await stream.publish(message.topic, message.body, headers={**headers, Header.MSG_ID: str(message.id)})

    def _is_open(self, client: Client) -> bool:
        return not client.is_closed

    async def _close(self, client: Client) -> None:
        await client.close()


def _sort(error: BaseException) -> BaseException:
    if isinstance(error, _DOWN):
        return caused(DestinationUnavailableError(f"NATS does not answer: {describe(error)}"), error)
    if isinstance(error, _NEVER):
        return caused(RejectedError(f"NATS can never take it: {describe(error)}"), error)
    return error


def received(raw: Msg, codec: Codec = _RECEIVED) -> Message:
    """Makes the message that was dispatched of what a consumer got.

    Raises:
        ValueError: When it was not sent by this library.
    """
    headers = {unescape(name): unescape(value) for name, value in (raw.headers or {}).items()}
    native = {ID: headers.pop(Header.MSG_ID, ""), TOPIC: raw.subject}
    return unpack(raw.data, headers | native, codec)
