"""Kafka, through aiokafka."""

import asyncio
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from copy import copy
from datetime import timedelta
from typing import Any, Final

import anyio

from outbox._codec import Codec
from outbox._errors import DestinationUnavailableError, RejectedError, describe, needs
from outbox._message import _RECEIVED, Message
from outbox.destinations._answers import caused, require_accepted
from outbox.destinations._connected import ConnectedDispatcher
from outbox.destinations._envelope import KEY, TOPIC, pack, reading, unpack

with needs("kafka"):
    from aiokafka import AIOKafkaProducer, errors
    from aiokafka.structs import ConsumerRecord

# Besides what aiokafka calls retriable.
_DOWN: Final = (
    errors.BrokerNotAvailableError,
    errors.KafkaTimeoutError,
    errors.KafkaUnavailableError,
    errors.ProducerClosed,  # by another batch, for one of these reasons
    OSError,
    TimeoutError,
)
# The producer cannot go on after these: another took its transactional id, or it lost count of what it sent.
_BROKEN: Final = (
    errors.IllegalOperation,
    errors.InvalidProducerEpoch,
    errors.InvalidProducerIdMapping,
    errors.OutOfOrderSequenceNumber,
    errors.ProducerFenced,
    errors.UnknownProducerId,
)
_NEVER: Final = (
    errors.InvalidTopicError,
    errors.MessageSizeTooLargeError,
    errors.RecordListTooLargeError,
    errors.RecordTooLargeError,
)
_PATIENCE_SECONDS: Final = 0.1
_RESERVED: Final = frozenset({"enable_idempotence", "key_serializer", "request_timeout_ms", "value_serializer"})


class KafkaDispatcher(ConnectedDispatcher[AIOKafkaProducer]):
    """Produces with an idempotent producer, and awaits the brokers' acknowledgement of every message (`acks=all`).

    The key is Kafka's key, so that the messages of a key go to one partition, in their order. A message counts as
    accepted when all replicas in sync have it (see the topic's `min.insync.replicas`). It connects on first use and may
    be used by any number of tasks at once.

    While Kafka is away the producer is closed, since it would keep what it has and send it besides what the relay
    sends again. What was under way then may arrive twice: its idempotence ends with the producer.

    With a `transactional_id` each batch is a transaction of Kafka, all or nothing for consumers that read committed,
    and batches follow one another. The outbox and Kafka still share no transaction: a batch whose outcome is lost is
    sent again, as a second transaction.

    Args:
        bootstrap_servers: Where to begin, as aiokafka takes it: "host:9092", or a list of these.
        timeout: How long one request may take, and a batch twice as long; after that Kafka counts as unavailable.
        settings: The other arguments of `AIOKafkaProducer`: security, compression, `transactional_id` and so on.

    Raises:
        TypeError: When `AIOKafkaProducer` has no such setting.
        ValueError: When a setting would break what is promised above.
    """

    def __init__(
        self, bootstrap_servers: str | list[str], *, timeout: timedelta = timedelta(seconds=10), **settings: Any
    ) -> None:
        if taken := _RESERVED & settings.keys():
            raise ValueError(f"{', '.join(sorted(taken))} cannot be set: this destination sets it")
        if settings.get("acks", "all") not in {"all", -1}:
            raise ValueError(f"acks={settings['acks']!r} would lose messages: it must be 'all'")
        inspect.signature(AIOKafkaProducer).bind_partial(**settings)  # it is made much later
        super().__init__(self._start, timeout=timeout)
        self._settings = {
            "bootstrap_servers": bootstrap_servers,
            "enable_idempotence": True,
            "request_timeout_ms": int(timeout.total_seconds() * 1000),
            **settings,
        }
        self._users = Counter[AIOKafkaProducer]()
        self._is_transactional = settings.get("transactional_id") is not None
        self._turn: AbstractAsyncContextManager[None] = asyncio.Lock() if self._is_transactional else nullcontext()

    async def dispatch(self, *messages: Message) -> None:
        """Produces the messages in their order and awaits all acknowledgements.

        Raises:
            PartialDispatchError: With the error of each message that was not acknowledged.
            DestinationUnavailableError: When no broker can be reached.
        """
        if messages:
            try:
                with anyio.fail_after(2 * self._timeout):
                    async with self._turn:
                        answers = await self._produce(await self._connected(), messages)
            except Exception as error:
                if not _is_down(error):
                    raise
                raise _sort(error) from error
            require_accepted(messages, answers, _sort)

    async def _produce(self, producer: AIOKafkaProducer, messages: Sequence[Message]) -> list[object]:
        """Returns for each None or its error; after some errors the next batch gets another producer."""
        sent: dict[int, asyncio.Future[Any]] = {}
        self._users[producer] += 1
        try:
            answers = await (self._transact if self._is_transactional else self._send)(producer, messages, sent)
            if any(map(_is_down, answers)):
                await self._give_up(producer)
            elif any(answers[index] for index in sent) and producer is self._client:
                # What was sent and refused leaves a gap in what an idempotent producer counts: it gets nothing new.
                self._client = None
        except BaseException:
            await self._give_up(producer)
            raise
        finally:
            self._users[producer] -= 1
            if not self._users[producer]:
                del self._users[producer]
                if producer is not self._client:
                    await self._close(producer)
        return answers

    async def _transact(
        self, producer: AIOKafkaProducer, messages: Sequence[Message], sent: dict[int, asyncio.Future[Any]]
    ) -> list[object]:
        """Sends all of them in one transaction, but those that cannot even be sent; one that fails undoes all."""
        await producer.begin_transaction()
        answers = await self._send(producer, messages, sent)
        if not any(isinstance(answers[index], BaseException) for index in sent):
            await producer.commit_transaction()
            return answers
        await producer.abort_transaction()
        undone = errors.KafkaError("its transaction was aborted, since another message of it failed")
        return [undone if answer is None else answer for answer in answers]

    async def _send(
        self, producer: AIOKafkaProducer, messages: Sequence[Message], sent: dict[int, asyncio.Future[Any]]
    ) -> list[object]:
        """Returns for each None or its error, and puts into `sent` what came as far as the producer's buffer."""
        answers: list[object] = [None] * len(messages)
        topics: dict[str, dict[int, Message]] = {}
        for index, message in enumerate(messages):
            topics.setdefault(message.topic, {})[index] = message
        await asyncio.gather(*(_enqueue(producer, part, answers, sent) for part in topics.values()))
        if sent:
            await asyncio.wait(sent.values(), timeout=self._timeout)
        refused: dict[tuple[str, type], BaseException] = {}
        for index, future in sent.items():
            error = future.exception() if future.done() else TimeoutError("no acknowledgement in time")
            # Brokers refuse records by the batch: one error for all of them, so that the relay finds out whose it is.
            answers[index] = error and refused.setdefault((messages[index].topic, type(error)), error)
        return answers

    async def _give_up(self, producer: AIOKafkaProducer) -> None:
        """Closes the producer, unless another batch was quicker; the next one makes another."""
        async with self._lock:
            if producer is self._client:
                await self._drop()

    async def _start(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(**self._settings)
        try:
            await producer.start()
        except BaseException:
            await self._close(producer)
            raise
        return producer

    def _is_open(self, client: AIOKafkaProducer) -> bool:
        sender = client._sender.sender_task  # it ends with an error that the producer does not survive
        return sender is not None and not sender.done()

    async def _close(self, client: AIOKafkaProducer) -> None:
        # Its stop() sends first what it has, and waits for a broker that may never come: what is undone is the relay's.
        with anyio.move_on_after(self._timeout, shield=True):
            sender = client._sender.sender_task
            while sender and not sender.done():
                sender.cancel()  # once for itself, and once for each request that it waits for
                await asyncio.wait([sender], timeout=_PATIENCE_SECONDS)
            client._message_accumulator.fail_all(errors.ProducerClosed())
            await client.stop()


async def _enqueue(
    producer: AIOKafkaProducer,
    messages: Mapping[int, Message],
    answers: list[object],
    sent: dict[int, asyncio.Future[Any]],
) -> None:
    """Gives messages of one topic to the producer, in their order.

    One that cannot be sent is answered at once. What says something of the topic or the broker, and took the whole time
    limit to find out, is the answer to all that follow.
    """
    last: BaseException | None = None
    for index, message in messages.items():
        if last is not None:
            answers[index] = copy(last)
            continue
        try:
            sent[index] = await producer.send(message.topic, **_record(message))
            sent[index].add_done_callback(_retrieve)
        except errors.UnknownTopicOrPartitionError as error:
            # It says so of any topic that is new to it while no broker answers.
            is_answered = await producer.client.force_metadata_update()
            answers[index] = last = error if is_answered else errors.KafkaConnectionError("no broker answers")
        except Exception as error:  # noqa: BLE001 -- whatever it is, it is the answer for this message
            answers[index] = error
            last = error if _is_down(error) else None


def _record(message: Message) -> dict[str, Any]:
    at = message.recorded_at
    return {
        "value": message.body,
        "key": None if message.key is None else message.key.encode(),
        "timestamp_ms": None if at is None else max(0, int(at.timestamp() * 1000)),
        "headers": [(name, value.encode()) for name, value in pack(message, TOPIC, KEY).items()],
    }


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Reads the answer that nobody may be left to read, so that it is not reported as forgotten."""
    if not future.cancelled():
        future.exception()


def _is_down(answer: object) -> bool:
    """Says whether it is Kafka or the producer that is not well: all that aiokafka retries but for a missing topic."""
    if isinstance(answer, errors.UnknownTopicOrPartitionError):
        return False
    return isinstance(answer, (*_DOWN, *_BROKEN)) or getattr(answer, "retriable", False)


def _sort(error: BaseException) -> BaseException:
    if _is_down(error):
        return caused(DestinationUnavailableError(f"Kafka is not available: {describe(error)}"), error)
    if isinstance(error, _NEVER):
        return caused(RejectedError(f"Kafka can never take it: {describe(error)}"), error)
    return error


@reading()
def received(record: "ConsumerRecord[bytes | None, bytes]", codec: Codec = _RECEIVED) -> Message:
    """Makes the message that was dispatched of what a consumer got.

    Raises:
        ValueError: When it was not sent by this library.
    """
    # What others add on the way, where it was forwarded from say, need not be text.
    headers = {name: text for name, value in record.headers if (text := _text(value)) is not None}
    headers[TOPIC] = record.topic
    if record.key is not None:
        headers[KEY] = record.key.decode()
    return unpack(record.value or b"", headers, codec)


def _text(value: bytes | None) -> str | None:
    """Returns a header's value, or None if it can be none of a message's."""
    try:
        return None if value is None or b"\0" in value else value.decode()
    except UnicodeDecodeError:
        return None
