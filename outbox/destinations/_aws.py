"""What SQS and SNS share: entries of at most ten in a request, attributes, errors, and the way back."""

import asyncio
import hashlib
import json
import re
from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import anyio

from outbox._codec import Codec
from outbox._dispatcher import BEHIND
from outbox._errors import (
    DestinationUnavailableError,
    OutboxError,
    PartialDispatchError,
    RejectedError,
    describe,
    needs,
)
from outbox._message import Message
from outbox.destinations._answers import caused
from outbox.destinations._envelope import ID, KEY, PREFIX, RECORDED_AT, TOPIC, escape, reading, unescape

with needs("aws"):
    from botocore import exceptions  # type: ignore[import-untyped]

HEADERS: Final = f"{PREFIX}headers"
"""The attribute that holds all headers, as a JSON object: a message has ten attributes at most."""
ENCODING: Final = f"{PREFIX}encoding"
"""The attribute that says that the body is base64."""
_TRACE: Final = ("traceparent", "tracestate")
_MOST_ENTRIES: Final = 10

Failures = dict[UUID, BaseException]
"""The error of each message that failed, by its id."""
Send = Callable[[str, list[dict[str, Any]]], Awaitable[Mapping[str, Any]]]
"""Sends entries to a queue or topic and returns the answer, with its `Failed` entries."""

# XML 1.0 has no others; a carriage return does not survive it. An empty body is not allowed either.
_TEXT: Final = re.compile(r"[\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]+")
_GROUP: Final = re.compile(r"[!-~]{1,128}")
# Nor is an empty text anywhere. The space decodes from base64 to nothing, and NUL is in no key.
_EMPTY_BODY: Final = " "
_EMPTY_TEXT: Final = "%00"

_DOWN: Final = (exceptions.ConnectionError, exceptions.HTTPClientError, OSError, TimeoutError)
_BUSY: Final = re.compile(r"Throttl|TooManyRequests|SlowDown|ServiceUnavailable|Internal|RequestTimeout", re.IGNORECASE)
# Of an entry it is the entry that is wrong; of a whole request it may as well be the address.
_NEVER_THIS_ENTRY: Final = re.compile(r"InvalidMessageContents|InvalidParameter|InvalidAttribute")
_NEVER_THIS_REQUEST: Final = re.compile(r"InvalidMessageContents|RequestTooLong")
_TOO_MANY_REQUESTS, _SERVERS_FAULT = 429, 500


class EntryError(OutboxError):
    """Why SQS or SNS did not take an entry of a request that it took."""


@dataclass(frozen=True, slots=True)
class _Entry:
    message: Message
    content: dict[str, Any]
    size: int


class BatchSender:
    """Sends messages in requests of ten, and reads what became of each.

    Requests to a FIFO queue or topic go one after the other. There, those behind a failure of their group are not
    sent, and fail with it.

    Args:
        address: The queue or topic, or a function that says it for each message.
        body: What the entry calls its body.
        send: Sends a request.
        max_size: How large a message may be, and all of a request, in bytes.
        concurrency: How many requests are under way at once.
        timeout: How long each may take.

    Raises:
        ValueError: When `concurrency` is not at least one.
    """

    def __init__(
        self,
        address: str | Callable[[Message], str],
        *,
        body: str,
        send: Send,
        max_size: int,
        concurrency: int,
        timeout: timedelta,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency!r}")
        self._address = address
        self._body = body
        self._send = send
        self._max_size = max_size
        self._slots = asyncio.Semaphore(concurrency)
        self._timeout = timeout.total_seconds()

    async def dispatch(self, *messages: Message) -> None:
        """Sends the messages and reads all answers.

        Raises:
            PartialDispatchError: With the error of each message that was not taken.
        """
        failures: Failures = {}
        entries: dict[str, list[_Entry]] = defaultdict(list)
        for message in messages:
            try:
                address = self._address if isinstance(self._address, str) else self._address(message)
                entries[address].append(self._entry(message, is_fifo=_is_fifo(address)))
            except Exception as error:  # noqa: BLE001 -- whatever it is, it is this message's
                failures[message.id] = error
        down: list[BaseException] = []
        sendings = [
            (self._send_in_order if _is_fifo(address) else self._send_at_once)(address, some, down)
            for address, some in entries.items()
        ]
        for failed in await asyncio.gather(*sendings):
            failures |= failed
        if failures:
            raise PartialDispatchError(failures)

    def _entry(self, message: Message, *, is_fifo: bool) -> _Entry:
        body, encoding = _text(message.body)
        texts = _attributes(message) | encoding
        size = len(body.encode()) + sum(len(name) + len("String") + len(text.encode()) for name, text in texts.items())
        if size > self._max_size:
            raise RejectedError(f"message {message.id}: {size} bytes with its attributes are beyond {self._max_size}")
        content: dict[str, Any] = {
            self._body: body,
            "MessageAttributes": {name: {"DataType": "String", "StringValue": text} for name, text in texts.items()},
        }
        if is_fifo:
            content |= {"MessageGroupId": _group(message), "MessageDeduplicationId": str(message.id)}
        return _Entry(message, content, size)

    async def _send_at_once(self, address: str, entries: Sequence[_Entry], down: list[BaseException]) -> Failures:
        failures: Failures = {}
        for failed in await asyncio.gather(*(self._request(address, chunk, down) for chunk in self._chunks(entries))):
            failures |= failed
        return failures

    async def _send_in_order(self, address: str, entries: Sequence[_Entry], down: list[BaseException]) -> Failures:
        failures: Failures = {}
        groups: dict[str, BaseException] = {}
        for chunk in self._chunks(entries):
            fresh = [entry for entry in chunk if _group(entry.message) not in groups]
            failed = await self._request(address, fresh, down) if fresh else {}
            for message in (entry.message for entry in chunk):
                if error := groups.get(_group(message)):
                    failed.setdefault(message.id, _behind(error))
            failures |= failed
            groups |= {_group(one.message): failed[one.message.id] for one in chunk if one.message.id in failed}
        return failures

    def _chunks(self, entries: Sequence[_Entry]) -> Iterator[list[_Entry]]:
        chunk: list[_Entry] = []
        for entry in entries:
            total = sum(one.size for one in chunk) + entry.size
            if chunk and (len(chunk) == _MOST_ENTRIES or total > self._max_size):
                yield chunk
                chunk = []
            chunk.append(entry)
        if chunk:
            yield chunk

    async def _request(self, address: str, entries: Sequence[_Entry], down: list[BaseException]) -> Failures:
        """Sends one request; returns the error of each message that was not taken.

        Args:
            address: Where to.
            entries: Ten at most.
            down: Why nothing more of this dispatch is sent, if there is a reason: it must not wait for each request.
        """
        ids = [entry.message.id for entry in entries]
        contents = [{"Id": str(number), **entry.content} for number, entry in enumerate(entries)]
        async with self._slots:
            if down:
                reason: BaseException = DestinationUnavailableError(f"not tried, since another failed: {down[0]}")
                return dict.fromkeys(ids, caused(reason, down[0]))
            try:
                with anyio.fail_after(self._timeout):
                    answer = await self._send(address, contents)
            except Exception as error:  # noqa: BLE001 -- whatever it is, it is that of all messages in the request
                reason = _sorted(error)
                if isinstance(reason, DestinationUnavailableError):
                    down.append(reason)
                return dict.fromkeys(ids, reason)
        # What is in neither list was not taken: a proxy, for one, may answer 200 with a page of its own.
        unknown = DestinationUnavailableError("the answer does not say that it was taken: is it the service's?")
        taken = {int(one["Id"]) for one in answer.get("Successful", ())}
        failed = {ids[int(one["Id"])]: _failed(one) for one in answer.get("Failed", ())}
        return {name: unknown for number, name in enumerate(ids) if number not in taken} | failed


def _is_fifo(address: str) -> bool:
    return address.endswith(".fifo")


def _group(message: Message) -> str:
    """Returns the group of a message: its key, or of a key that can be none, a hash; without a key one of its own."""
    if message.key is None:
        return str(message.id)
    return message.key if _GROUP.fullmatch(message.key) else hashlib.sha256(message.key.encode()).hexdigest()


def _behind(error: BaseException) -> BaseException:
    """Returns what those behind a failure fail with; where nothing gets through, they spend no attempt either."""
    return caused((type(error) if isinstance(error, DestinationUnavailableError) else OutboxError)(BEHIND), error)


def _text(body: bytes) -> tuple[str, dict[str, str]]:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = ""
    if _TEXT.fullmatch(text):
        return text, {}
    return b64encode(body).decode() or _EMPTY_BODY, {ENCODING: "base64"}


def _attributes(message: Message) -> dict[str, str]:
    headers, recorded_at = message.headers, message.recorded_at
    own = {
        ID: str(message.id),
        TOPIC: message.topic,
        KEY: message.key,
        RECORDED_AT: recorded_at.isoformat() if recorded_at else None,
    }
    trace = {name: headers.get(name) or None for name in _TRACE}
    texts = {name: escape(text) or _EMPTY_TEXT for name, text in (own | trace).items() if text is not None}
    return texts | ({HEADERS: json.dumps(dict(headers), separators=(",", ":"))} if headers else {})


def _failed(entry: Mapping[str, Any]) -> BaseException:
    """Makes an error of an entry that was not taken."""
    code, text = entry.get("Code", ""), f"{entry.get('Code')}: {entry.get('Message', '')}"
    if _BUSY.search(code) or not entry.get("SenderFault"):
        return DestinationUnavailableError(f"the service could not take it now: {text}")
    return (
        RejectedError(f"the service can never take it: {text}") if _NEVER_THIS_ENTRY.search(code) else EntryError(text)
    )


def _sorted(error: Exception) -> BaseException:
    """Makes of the client's error what the relay understands."""
    if isinstance(error, exceptions.ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status >= _SERVERS_FAULT or status == _TOO_MANY_REQUESTS or _BUSY.search(code):
            return caused(DestinationUnavailableError(f"the service takes nothing now: {describe(error)}"), error)
        if _NEVER_THIS_REQUEST.search(code):
            return caused(RejectedError(f"the service can never take it: {describe(error)}"), error)
    if isinstance(error, _DOWN):
        return caused(DestinationUnavailableError(f"the service does not answer: {describe(error)}"), error)
    return error


@reading()
def received(raw: Mapping[str, Any], body: str, codec: Codec) -> Message:
    """Makes the message that was dispatched of the attributes in any of their forms, and the body.

    Raises:
        ValueError: When it was not sent by this library, or its attributes were not asked for.
    """
    attributes = raw.get("MessageAttributes") or raw.get("messageAttributes") or {}
    texts = {name: _value(attribute) for name, attribute in attributes.items()}
    own = {name: unescape(text).replace("\0", "") for name, text in texts.items() if name not in {HEADERS, ENCODING}}
    if missing := next((name for name in (ID, TOPIC) if not own.get(name)), None):
        raise ValueError(f"it has no attribute {missing!r}, or was received without asking for 'All'")
    return Message.from_body(
        b64decode(body) if texts.get(ENCODING) == "base64" else body.encode(),
        topic=own[TOPIC],
        key=own.get(KEY),
        headers=json.loads(texts.get(HEADERS, "{}")),
        id=UUID(own[ID]),
        recorded_at=datetime.fromisoformat(own[RECORDED_AT]) if RECORDED_AT in own else None,
        codec=codec,
    )


def _value(attribute: Mapping[str, Any]) -> str:
    """Reads an attribute as SQS, a Lambda function, or the envelope of SNS has it."""
    return str(attribute.get("StringValue") or attribute.get("stringValue") or attribute.get("Value") or "")
