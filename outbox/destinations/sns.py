"""Amazon SNS, through aiobotocore."""

from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any, Final, Protocol

import orjson

from outbox._codec import Codec
from outbox._message import _RECEIVED, Message
from outbox.destinations import _aws, sqs
from outbox.destinations._aws import BatchSender, EntryError
from outbox.destinations._envelope import reading

__all__ = ["EntryError", "SnsClient", "SnsDispatcher", "received"]

_MAX_SIZE: Final = 256 * 1024  # of a message and of a request: "PublishBatch" in the API reference


class SnsClient(Protocol):
    """What is used of an aiobotocore client, whose methods are made at run time."""

    @property
    def publish_batch(self) -> Callable[..., Awaitable[Mapping[str, Any]]]:
        """Publishes up to ten messages to a topic."""


class SnsDispatcher:
    """Publishes to topics, ten messages in a request, and reads what became of each.

    An acknowledgement means that SNS has stored the message and delivers it to the subscriptions there are, by their
    delivery policies; what they cannot take, only their dead-letter queues keep. To a FIFO topic (`.fifo`) the key is
    the group and the id the deduplication id, so that SNS itself drops a duplicate within five minutes; a message
    without a key is a group of its own. Requests to a FIFO topic go one after the other.

    Args:
        client: A client of aiobotocore, which connects by itself and stays yours to close. Let it not retry on its own:
            `AioConfig(retries={"total_max_attempts": 1})`. The relay does, and counts.
        topic: The ARN of the topic, or a function that says it for each message.
        max_size: How large a message may be with its attributes, in bytes: `MaximumMessageSize` of the topic, which
            may be up to 1 MiB.
        concurrency: How many requests are under way at once; ten connections is what a client has by default.
        timeout: How long each may take; after that SNS counts as unavailable.

    Raises:
        ValueError: When `concurrency` is not at least one.
    """

    def __init__(
        self,
        client: SnsClient,
        topic: str | Callable[[Message], str],
        *,
        max_size: int = _MAX_SIZE,
        concurrency: int = 10,
        timeout: timedelta = timedelta(seconds=10),
    ) -> None:
        self._client = client
        self._sender = BatchSender(
            topic, body="Message", send=self._send, max_size=max_size, concurrency=concurrency, timeout=timeout
        )

    async def dispatch(self, *messages: Message) -> None:
        """Publishes the messages, and reads the answer to each.

        Raises:
            PartialDispatchError: With the error of each message that was not stored.
        """
        await self._sender.dispatch(*messages)

    async def _send(self, topic: str, entries: list[dict[str, Any]]) -> Mapping[str, Any]:
        return await self._client.publish_batch(TopicArn=topic, PublishBatchRequestEntries=entries)


def received(raw: Mapping[str, Any], codec: Codec = _RECEIVED) -> Message:
    """Makes the message that was dispatched of what a subscription got.

    Args:
        raw: A notification, as an HTTP endpoint or a Lambda function (`Records[…]["Sns"]`) gets it; or a message of a
            queue that is subscribed, with raw delivery or without.
        codec: Decodes the payload, when somebody reads it.

    Raises:
        ValueError: When it was not sent by this library.
    """
    if "Message" in raw:
        return _aws.received(raw, raw["Message"], codec)
    if raw.get("MessageAttributes") or raw.get("messageAttributes"):  # raw delivery
        return sqs.received(raw, codec)
    with reading():
        notification = orjson.loads(raw.get("Body") or raw.get("body") or "null")
        if not isinstance(notification, dict) or "Message" not in notification:
            raise ValueError("it is no notification of SNS, nor one of raw delivery with its attributes")
    return _aws.received(notification, notification["Message"], codec)
