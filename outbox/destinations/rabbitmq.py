"""RabbitMQ, through aio-pika."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final

import anyio

from outbox._codec import Codec
from outbox._errors import DestinationUnavailableError, RejectedError, describe, needs
from outbox._message import _RECEIVED, Message
from outbox.destinations._answers import caused, require_accepted
from outbox.destinations._connected import Connect, ConnectedDispatcher
from outbox.destinations._envelope import ID, TOPIC, pack, reading, unpack

with needs("rabbitmq"):
    from aio_pika import DeliveryMode
    from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
    from aiormq import exceptions, spec
    from aiormq.abc import AbstractChannel as Wire

_DOWN: Final = (
    exceptions.AMQPConnectionError,
    exceptions.ChannelInvalidStateError,
    OSError,
    TimeoutError,
    asyncio.CancelledError,  # what the client makes of a publish whose connection was closed from this side
)
# The broker cut the connection over what it was sent, so it is not down: taken for that, it would be sent for ever.
_GARBLED: Final = (
    exceptions.ConnectionCommandInvalid,
    exceptions.ConnectionFrameError,
    exceptions.ConnectionNotImplemented,
    exceptions.ConnectionSyntaxError,
    exceptions.ConnectionUnexpectedFrame,
)
# What the client meets that goes on publishing to a channel which the broker has closed; the reason may get lost.
_AFTERWARDS: Final = (exceptions.ChannelInvalidStateError, exceptions.ConnectionChannelError)
_CLOSED: Final = (exceptions.ChannelClosed, *_AFTERWARDS)
_OVER_ONE: Final = (exceptions.ChannelPreconditionFailed, exceptions.ConnectionChannelError)
_LONGEST_TOPIC: Final = 255
_LONGEST_NAME: Final = 128
"""AMQP's limits, in bytes; a longer name of a header would be cut, without a word."""
_AROUND_PROPERTIES: Final = 20
"""What a frame has besides the properties of its message, in bytes."""
_AROUND_HEADER: Final = 6
_BYTES_OF_LETTER: Final = 4
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_PROBE_SECONDS: Final = 1


class RabbitMQDispatcher(ConnectedDispatcher[AbstractConnection]):
    """Publishes to an exchange, the topic as the routing key, and awaits the broker's confirm of every message.

    What reaches no queue is an error (`mandatory`). A confirm means that each queue it reached has the message: on the
    disk of a durable classic queue, on a majority of the nodes of a quorum queue. Messages are persistent. It
    declares nothing: exchanges, queues and bindings are yours. It connects on first use and may be used by any number
    of tasks at once, each batch on a channel of its own.

    Args:
        connect: Makes a connection: `functools.partial(aio_pika.connect, "amqp://localhost")`.
        exchange: Its name. "" is the default exchange, where the topic is the name of a queue.
        content_type: What the bodies are, as your codec makes them. None says nothing.
        timeout: How long to wait for a connection, and for the confirms of a batch; after that the broker counts as
            unavailable.
    """

    def __init__(
        self,
        connect: Connect[AbstractConnection],
        *,
        exchange: str = "",
        content_type: str | None = "application/json",
        timeout: timedelta = timedelta(seconds=10),
    ) -> None:
        super().__init__(connect, timeout=timeout)
        self._exchange = exchange
        self._content_type = content_type
        self._idle: list[AbstractChannel] = []

    async def dispatch(self, *messages: Message) -> None:
        """Publishes the messages in their order and awaits all confirms.

        Raises:
            PartialDispatchError: With the error of each message that was not confirmed.
            DestinationUnavailableError: When the broker cannot be reached.
        """
        if messages:
            answers = await self._publish(messages)
            if len(messages) > 1 and any(isinstance(answer, _OVER_ONE) for answer in answers):
                await self._publish_alone(messages, answers)
            require_accepted(messages, answers, _sort)

    async def _publish_alone(self, messages: Sequence[Message], answers: list[object]) -> None:
        """Publishes one by one what got no answer of its own when the broker closed the channel over one of them."""
        undecided = [at for at, answer in enumerate(answers) if isinstance(answer, _CLOSED)]
        for done, at in enumerate(undecided, 1):
            (answers[at],) = await self._publish([messages[at]])
            if isinstance(answers[at], exceptions.ChannelClosed) and not isinstance(answers[at], _OVER_ONE):
                for left in undecided[done:]:  # no exchange, no access: it is the same for all
                    answers[left] = answers[at]
                return

    async def _publish(self, messages: Sequence[Message]) -> list[object]:
        """Publishes on a channel of their own; returns for each what its publishing returned, or raised."""
        client = await self._connected()
        channel, wire = await self._channel(client)
        answers: list[object] = []
        try:
            publishing = [self._publish_one(wire, message) for message in messages]
            answers += await asyncio.gather(*publishing, return_exceptions=True)
        finally:
            # After a cancellation too: confirms that come late find nobody who waits for them.
            if any(isinstance(answer, (*_DOWN, exceptions.AMQPChannelError)) for answer in answers):
                await self._retire(client, channel, overrun=len(messages) > 1)
            elif client is self._client and not channel.is_closed:
                self._idle.append(channel)
        closed = next((answer for answer in answers if isinstance(answer, exceptions.ChannelClosed)), None)
        return [closed if closed and isinstance(one, _AFTERWARDS) else one for one in answers]

    async def _publish_one(self, wire: Wire, message: Message) -> None:
        properties = self._properties(message)
        _require_one_frame(message, properties, wire.connection.connection_tune.frame_max)
        await wire.basic_publish(
            message.body,
            exchange=self._exchange,
            routing_key=message.topic,
            properties=properties,
            mandatory=True,
            timeout=self._timeout,
        )

    def _properties(self, message: Message) -> spec.Basic.Properties:
        headers = pack(message, ID, TOPIC)
        limits = {message.topic: _LONGEST_TOPIC} | dict.fromkeys(headers, _LONGEST_NAME)
        if long := next((name for name, limit in limits.items() if len(name.encode()) > limit), None):
            raise RejectedError(
                f"message {message.id}: {long!r} is longer than the {limits[long]} bytes AMQP has for it"
            )
        recorded_at, kind = message.recorded_at, headers.get("type", "")
        return spec.Basic.Properties(
            headers=dict(headers),
            content_type=self._content_type,
            delivery_mode=DeliveryMode.PERSISTENT,
            message_id=str(message.id),
            timestamp=recorded_at if recorded_at and recorded_at >= _EPOCH else None,
            message_type=kind if 0 < len(kind.encode()) <= _LONGEST_TOPIC else None,
        )

    async def _channel(self, client: AbstractConnection) -> tuple[AbstractChannel, Wire]:
        try:
            with anyio.fail_after(self._timeout):
                await _unblocked(client)
                idle = [channel for channel in self._idle if not channel.is_closed]
                channel = idle.pop() if idle else client.channel(publisher_confirms=True, on_return_raises=True)
                self._idle = idle
                if not channel.is_initialized:
                    await channel.initialize()
                return channel, await channel.get_underlay_channel()
        except (*_DOWN, RuntimeError) as error:  # it depends on when the connection was lost
            raise _unavailable(error) from error

    async def _retire(self, client: AbstractConnection, channel: AbstractChannel, *, overrun: bool) -> None:
        """Closes a channel on which something went wrong, and the connection if that cannot be used any more either.

        What was published behind the message over which the broker closed the channel makes it close the connection.
        """
        with anyio.move_on_after(0) as waiting:
            await _unblocked(client)
        if waiting.cancelled_caught:
            # The broker reads nothing until its alarm is over. What was sent lies in front of it: more would only add
            # duplicates, as a new connection would.
            self._idle.append(channel)
            return
        if not (overrun and channel.is_closed):
            with anyio.move_on_after(_PROBE_SECONDS, shield=True), suppress(Exception):
                await channel.close()
                return
        if client is self._client:
            await self._drop()

    def _is_open(self, client: AbstractConnection) -> bool:
        return client.connected.is_set() and client.transport is not None and not client.transport.connection.is_closed

    async def _close(self, client: AbstractConnection) -> None:
        self._idle.clear()
        await client.close()


def _require_one_frame(message: Message, properties: spec.Basic.Properties, frame: int) -> None:
    headers = properties.headers or {}
    most = sum(len(name) + len(str(value)) + _AROUND_HEADER for name, value in headers.items()) * _BYTES_OF_LETTER
    # Mostly that is enough to know, and to encode them once more costs as much as to publish.
    if most > frame // 2 and len(properties.marshal()) > frame - _AROUND_PROPERTIES:
        raise RejectedError(f"message {message.id}: its headers do not fit into one frame of the connection")


async def _unblocked(client: AbstractConnection) -> None:
    """Waits while an alarm of the broker, for memory or disk, blocks the connection."""
    if client.transport is not None:
        await client.transport.ready()


def _sort(error: BaseException) -> BaseException:
    if isinstance(error, exceptions.ChannelPreconditionFailed):
        return caused(RejectedError(f"RabbitMQ can never take it: {describe(error)}"), error)
    return _unavailable(error) if isinstance(error, _DOWN) and not isinstance(error, _GARBLED) else error


def _unavailable(error: BaseException) -> BaseException:
    return caused(DestinationUnavailableError(f"RabbitMQ does not answer: {describe(error)}"), error)


@reading()
def received(raw: AbstractIncomingMessage, codec: Codec = _RECEIVED) -> Message:
    """Makes the message that was dispatched of what a consumer got.

    Raises:
        ValueError: When it was not sent by this library.
    """
    # What the broker adds on the way, a count of deliveries for one, is not text.
    headers = {name: value for name, value in raw.headers.items() if isinstance(value, str)}
    native = {ID: raw.message_id or "", TOPIC: raw.routing_key or ""}
    return unpack(raw.body, headers | native, codec)
