"""Amazon SQS, through aiobotocore."""

from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any, Final, Protocol

from outbox._codec import Codec
from outbox._message import _RECEIVED, Message
from outbox.destinations import _aws
from outbox.destinations._aws import BatchSender, EntryError

__all__ = ["EntryError", "SqsClient", "SqsDispatcher", "received"]

_MAX_SIZE: Final = 1024 * 1024  # of a message and of a request, since August 2025: "Quotas" in the developer guide


class SqsClient(Protocol):
    """What is used of an aiobotocore client, whose methods are made at run time."""

    @property
    def send_message_batch(self) -> Callable[..., Awaitable[Mapping[str, Any]]]:
        """Sends up to ten messages to a queue."""


class SqsDispatcher:
    """Sends to queues, ten messages in a request, and reads what became of each.

    An acknowledgement means that SQS has stored the message, on several servers. To a FIFO queue (`.fifo`) the key is
    the group and the id the deduplication id, so that SQS itself drops a duplicate within five minutes; a message
    without a key is a group of its own. Requests to a FIFO queue go one after the other.

    Args:
        client: A client of aiobotocore, which connects by itself and stays yours to close. Let it not retry on its own:
            `AioConfig(retries={"total_max_attempts": 1})`. The relay does, and counts.
        queue: The URL of the queue, or a function that says it for each message.
        max_size: How large a message may be with its attributes, in bytes: `MaximumMessageSize` of the queue.
        concurrency: How many requests are under way at once; ten connections is what a client has by default.
        timeout: How long each may take; after that SQS counts as unavailable.

    Raises:
        ValueError: When `concurrency` is not at least one.
    """

    def __init__(
        self,
        client: SqsClient,
        queue: str | Callable[[Message], str],
        *,
        max_size: int = _MAX_SIZE,
        concurrency: int = 10,
        timeout: timedelta = timedelta(seconds=10),
    ) -> None:
        self._client = client
        self._sender = BatchSender(
            queue, body="MessageBody", send=self._send, max_size=max_size, concurrency=concurrency, timeout=timeout
        )

    async def dispatch(self, *messages: Message) -> None:
        """Sends the messages, and reads the answer to each.

        Raises:
            PartialDispatchError: With the error of each message that was not stored.
        """
        await self._sender.dispatch(*messages)

    async def _send(self, queue: str, entries: list[dict[str, Any]]) -> Mapping[str, Any]:
        return await self._client.send_message_batch(QueueUrl=queue, Entries=entries)


def received(raw: Mapping[str, Any], codec: Codec = _RECEIVED) -> Message:
    """Makes the message that was dispatched of what `receive_message` returned, or a Lambda function was called with.

    Args:
        raw: One message, received with `MessageAttributeNames=["All"]`.
        codec: Decodes the payload, when somebody reads it.

    Raises:
        ValueError: When it was not sent by this library.
    """
    return _aws.received(raw, raw["Body"] if "Body" in raw else raw.get("body", ""), codec)
