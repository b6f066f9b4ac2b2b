"""RabbitMQ, NATS JetStream, Kafka and Redis Streams, through FastStream."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from importlib import import_module
from itertools import repeat
from typing import Any, Final, Protocol

import anyio

from outbox._codec import Codec
from outbox._errors import DestinationUnavailableError, OutboxError, RejectedError, describe, needs
from outbox._message import _RECEIVED, Message
from outbox.destinations._answers import Sort, caused, require_body_within, send_fitting
from outbox.destinations._envelope import PREFIX, escape, pack, reading, unescape, unpack

with needs("faststream"):
    from faststream.message import StreamMessage

ADDED: Final = f"{PREFIX}added"
"""Names the headers that FastStream reads and the message did not have."""

_SORTED_BY: Final = {
    "rabbit": "outbox.destinations.rabbitmq",
    "nats": "outbox.destinations.nats",
    "kafka": "outbox.destinations.kafka",
    "redis": "outbox.destinations.redis",
}
"""Where the errors of each client are known: imported only when there is a broker of that kind."""

_CLOSED_FOR_GOOD: Final = (
    "the client of NATS is closed for good: start this process anew, "
    "and give the broker max_reconnect_attempts=-1, without which it gives up reconnecting"
)

Call = Mapping[str, Any]
"""The arguments of one `broker.publish`."""


class FastStreamBroker(Protocol):
    """What is used of a broker of FastStream."""

    @property
    def connect(self) -> Callable[[], Awaitable[Any]]:
        """Connects, unless it is connected."""

    @property
    def publish(self) -> Callable[..., Awaitable[Any]]:
        """Publishes one message."""


class FastStreamDispatcher:
    """Publishes through a broker of FastStream, middlewares and all, for its subscribers to read as their own.

    The topic is the routing key, the subject, the topic or the stream. It awaits what each client can say:

    - `RabbitBroker`: the publisher's confirm. Messages are persistent, and what reaches no queue is an error.
    - `NatsBroker`: JetStream's acknowledgement; `stream="ORDERS"` is required, since without it FastStream publishes to
      whoever listens at that moment. Give it `max_reconnect_attempts=-1`: after 60 attempts, its default, its client is
      closed for good, and all is unavailable until the process starts anew.
    - `KafkaBroker`: the acknowledgement that its `acks` asks for; give it `enable_idempotence=True`, or one that fails
      over may lose what it acknowledged. The key is the key.
    - `confluent.KafkaBroker`: the same, with the delivery report.
    - `RedisBroker`: an entry in a stream, never a channel, which forgets. A batch is one pipeline.

    It connects a broker that is not connected; the broker stays yours to stop.

    Args:
        broker: One of these brokers.
        content_type: What the bodies are, as your codec makes them; by it FastStream knows how to decode them.
        max_body: The largest body that is sent, in bytes: of one too large, RabbitMQ closes the channel and Redis the
            connection, which fails the whole batch. None sends all.
        timeout: How long to wait for a connection, and for the acknowledgements of a batch; after that the broker
            counts as unavailable.
        options: More arguments of every `broker.publish`: `stream`, `exchange`, `maxlen`.

    Raises:
        ValueError: When the broker is of another kind, has no such option, or would lose messages.
    """

    def __init__(
        self,
        broker: FastStreamBroker,
        *,
        content_type: str | None = "application/json",
        max_body: int | None = None,
        timeout: timedelta = timedelta(seconds=10),
        **options: Any,
    ) -> None:
        self._broker = broker
        self._kind = _kind(broker)
        if unknown := options.keys() - inspect.signature(broker.publish).parameters.keys():
            raise ValueError(f"{type(broker).__name__}.publish has no argument {min(unknown)!r}")
        if self._kind == "nats" and not options.get("stream"):
            raise ValueError('name the stream that stores the messages, stream="ORDERS": without one NATS forgets them')
        self._sort = _sort_of(self._kind)
        self._content_type = content_type
        self._max_body = max_body
        self._timeout = timeout.total_seconds()
        self._options = options
        self._lock = asyncio.Lock()

    async def dispatch(self, *messages: Message) -> None:
        """Publishes the messages in their order and awaits all acknowledgements.

        Raises:
            PartialDispatchError: With the error of each message that was not acknowledged.
            DestinationUnavailableError: When the broker cannot be reached.
        """
        if messages:
            connection = await self._connected()
            await send_fitting(
                messages, partial(self._call, connection), partial(self._publish, connection), self._sort
            )

    async def _connected(self) -> Any:
        async with self._lock:  # several batches may be the first
            try:
                with anyio.fail_after(self._timeout):
                    connection = await self._broker.connect()
            except Exception as error:
                raise DestinationUnavailableError(f"cannot connect to the broker: {describe(error)}") from error
        if self._kind == "nats" and connection.is_closed:  # and FastStream makes no other
            raise DestinationUnavailableError(_CLOSED_FOR_GOOD)
        return connection

    async def _publish(self, connection: Any, calls: Sequence[Call]) -> Sequence[object]:
        match self._kind:
            case "rabbit" | "nats":
                publishing = [self._publish_one(call) for call in calls]
                return await asyncio.gather(*publishing, return_exceptions=True)
            case "redis":
                return await self._publish_in_pipeline(connection, calls)
            case _:
                return await self._publish_in_turn(calls)

    async def _publish_one(self, call: Call) -> None:
        with anyio.fail_after(self._timeout):
            answer = await self._broker.publish(**call)
        if answer is None:
            raise OutboxError("the channel confirms nothing: give the broker one with publisher_confirms=True")
        if returned := getattr(answer, "delivery", None):
            raise OutboxError(f"no queue took the message: {returned.reply_text}, {returned.routing_key!r}")

    async def _publish_in_turn(self, calls: Sequence[Call]) -> Sequence[object]:
        """Hands all to a client that keeps their order only so, then awaits the reports that it promised."""
        answers: list[object] = []
        with anyio.move_on_after(self._timeout):
            for call in calls:
                answers.append(await self._called(call))  # noqa: PERF401 -- those before the time limit count
            if reports := [answer for answer in answers if isinstance(answer, asyncio.Future)]:
                await asyncio.wait(reports)
        answers += [TimeoutError() for _ in calls[len(answers) :]]
        return [_outcome(answer) if isinstance(answer, asyncio.Future) else answer for answer in answers]

    async def _publish_in_pipeline(self, client: Any, calls: Sequence[Call]) -> Sequence[object]:
        """Appends all in one round trip: alone, each would take a connection of its own, and any order."""
        pipeline = client.pipeline(transaction=False)
        answers = [await self._called({**call, "pipeline": pipeline}) for call in calls]
        try:
            with anyio.fail_after(self._timeout):
                appended = iter(await pipeline.execute(raise_on_error=False))
        except Exception as error:  # noqa: BLE001 -- it is the answer to all of them
            appended = repeat(error)
        return [answer if isinstance(answer, Exception) else next(appended) for answer in answers]

    async def _called(self, call: Call) -> object:
        try:
            return await self._broker.publish(**call)
        except Exception as error:  # noqa: BLE001 -- it is this message's answer
            return error

    def _call(self, connection: Any, message: Message) -> Call:
        require_body_within(message, self._max_body)
        name, own = str(message.id), pack(message)
        headers = {escape(key): escape(value) for key, value in self._with_added(name, own).items()}
        if self._kind == "nats":  # whose client, cut by the server over one of these, is closed for good
            import_module(_SORTED_BY["nats"]).require_fitting(message, headers, connection.max_payload)
        common = {"message": message.body, "headers": headers, "correlation_id": own.get("correlation_id", name)}
        return {**self._options, **common, **self._particular(message)}

    def _particular(self, message: Message) -> Call:
        match self._kind:
            case "rabbit":
                sure = {"persist": True, "mandatory": True}
                native = {"message_id": str(message.id), "content_type": self._content_type}
                return {"routing_key": message.topic, "timestamp": message.recorded_at, **native, **sure}
            case "nats":
                return {"subject": message.topic, "timeout": self._timeout}
            case "redis":
                return {"stream": message.topic}
            case _:
                key = None if message.key is None else message.key.encode()
                return {"topic": message.topic, "key": key, "no_confirm": True}

    def _with_added(self, name: str, own: dict[str, str]) -> dict[str, str]:
        """Adds what FastStream reads from headers where the broker has no place of its own for it."""
        if self._kind == "rabbit":
            return own
        added = {"content-type": self._content_type or "", "correlation_id": name, "message_id": name}
        if self._kind == "nats":
            added |= {"Nats-Msg-Id": name, "Nats-Expected-Stream": self._options["stream"]}
        return added | own | {ADDED: " ".join(added.keys() - own.keys())}


def _outcome(report: "asyncio.Future[Any]") -> object:
    if not report.done() or report.cancelled():
        return TimeoutError()
    return report.exception() or report.result()


def _kind(broker: FastStreamBroker) -> str:
    for base in type(broker).__mro__:
        package, _, rest = base.__module__.partition(".")
        kind = rest.partition(".")[0]
        if package == "faststream" and kind in {*_SORTED_BY, "confluent"}:
            return kind
    raise ValueError(f"{type(broker).__name__} is no broker of FastStream for RabbitMQ, NATS, Kafka or Redis")


def _sort_of(kind: str) -> Sort:
    if kind == "confluent":
        return _sort_confluent
    sort: Sort = import_module(_SORTED_BY[kind])._sort
    return sort


def _sort_confluent(error: BaseException) -> BaseException:
    """Asks librdkafka's own error, by its name: the client need not be imported for that."""
    reason = error.args[0] if error.args else None
    if getattr(reason, "name", lambda: "")() in {"MSG_SIZE_TOO_LARGE", "INVALID_MSG_SIZE", "INVALID_RECORD"}:
        return caused(RejectedError(f"Kafka can never take it: {describe(error)}"), error)
    if isinstance(error, (TimeoutError, OSError, BufferError)) or getattr(reason, "retriable", bool)():
        return caused(DestinationUnavailableError(f"Kafka does not answer: {describe(error)}"), error)
    return error


@reading()
def received(message: StreamMessage[Any], codec: Codec = _RECEIVED) -> Message:
    """Makes the message that was dispatched of what a subscriber of FastStream got: its `NatsMessage`, for one.

    Raises:
        ValueError: When it was not sent by this library.
    """
    texts = {name: value for name, value in message.headers.items() if isinstance(value, str)}
    headers = {unescape(name): unescape(value) for name, value in texts.items()}
    for name in headers.get(ADDED, "").split():
        headers.pop(name, None)
    return unpack(message.body, headers, codec)
