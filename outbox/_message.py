"""The one thing that flows: `Message`."""

import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum
from types import MappingProxyType
from typing import Any, Final, Self
from uuid import UUID

import orjson

from outbox._codec import Codec, JsonCodec
from outbox._errors import CodecError

_PLAIN: Final = JsonCodec()
_RECEIVED: Final = JsonCodec()
_NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})
_FIRST: Final = datetime.min.replace(tzinfo=UTC)
_LAST: Final = datetime.max.replace(tzinfo=UTC)
_POSTGRES_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)


class _Missing(Enum):  # of an Enum there is one member only, whoever copies or pickles it
    PAYLOAD = "not decoded yet"


_MISSING: Final = _Missing.PAYLOAD


class Message:
    """A message on its way, the same immutable type at both ends of the outbox.

    Payload and body are two forms of one content: whichever is missing is made on first use, so a relay
    forwards bytes and decodes nothing that nobody reads.

    Args:
        payload: What the codec can encode: with `JsonCodec`, JSON's types, dataclasses, pydantic models, structs.
        topic: Where it belongs, in the words of the destination: a routing key, a subject, a topic. Not empty.
        key: Messages of one key belong together and, where order is asked for, stay in order. None is no key.
        headers: Text by name. The header `type` is the codec's.
        id: Identifies the message for ever, through every retry and duplicate: a new UUIDv7 unless given.
        recorded_at: When it was recorded; the database's clock at the INSERT unless given. Aware.
        due_at: Not to be delivered before this time. Aware. None is at once.

    Raises:
        TypeError: When an argument has the wrong type.
        ValueError: When a text is empty where it must not be, contains NUL or a lone surrogate, or a time is naive.
    """

    __slots__ = (
        "_attempts",
        "_body",
        "_codec",
        "_dispatched_at",
        "_due_at",
        "_headers",
        "_id",
        "_key",
        "_lane",
        "_payload",
        "_position",
        "_recorded_at",
        "_topic",
    )

    def __init__(
        self,
        payload: Any,
        *,
        topic: str,
        key: str | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
        id: UUID | None = None,  # noqa: A002 -- the field's word, keyword-only
        recorded_at: datetime | None = None,
        due_at: datetime | None = None,
    ) -> None:
        self._id = uuid7() if id is None else id
        if not isinstance(self._id, UUID):
            raise TypeError(f"id must be a uuid.UUID, not {type(id).__name__}")
        self._topic = self._text("topic", topic)
        if not topic:
            raise ValueError(f"message {self._id}: topic must not be empty")
        self._key = None if key is None else self._text("key", key)
        self._headers: Mapping[str, str] | str = self._checked(headers)
        self._recorded_at: datetime | bytes | None = self._aware("recorded_at", recorded_at)
        self._due_at = self._aware("due_at", due_at)
        self._payload = payload
        self._body: bytes | None = None
        self._codec: Codec = _PLAIN
        self._position: int | None = None
        self._dispatched_at: datetime | None = None
        self._attempts = 0
        self._lane: int | None = None

    @classmethod
    def from_body(
        cls,
        body: bytes,
        *,
        topic: str,
        key: str | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
        id: UUID | None = None,  # noqa: A002 -- as above
        recorded_at: datetime | None = None,
        codec: Codec = _RECEIVED,
    ) -> Self:
        """Makes a message of bytes that are encoded already, as a consumer does of what its broker gave it.

        Dispatched into an outbox its body is forwarded as it is.

        Args:
            body: The encoded bytes.
            topic: As above, and so are key, headers, id and recorded_at.
            key: What it belongs together with.
            headers: Text by name, with the codec's header `type` if it had one.
            id: Identifies the message: that of the sender.
            recorded_at: When the sender recorded it.
            codec: Decodes the payload, when somebody reads it.

        Raises:
            TypeError: When an argument has the wrong type.
            ValueError: As above.
        """
        if not isinstance(body, bytes):
            raise TypeError(f"body must be bytes, not {type(body).__name__}")
        message = cls(_MISSING, topic=topic, key=key, headers=headers, id=id, recorded_at=recorded_at)
        message._body = body
        message._codec = codec
        return message

    @classmethod
    def _stored(  # noqa: PLR0917 -- the columns of a row, unpacked
        cls,
        codec: Codec,
        position: int,
        id: UUID,  # noqa: A002 -- the column's name
        topic: str,
        key: str | None,
        headers: str,
        body: bytes,
        recorded_at: bytes,
        attempts: int = 0,
        lane: int | None = None,
    ) -> Self:
        message = cls.__new__(cls)
        message._codec = codec
        message._position = position
        message._id = id
        message._topic = topic
        message._key = key
        message._headers = headers
        message._body = body
        message._payload = _MISSING
        message._recorded_at = recorded_at
        message._due_at = None
        message._dispatched_at = None
        message._attempts = attempts
        message._lane = lane
        return message

    @property
    def id(self) -> UUID:
        """Identifies the message through every retry and duplicate."""
        if type(self._id) is not UUID:  # the driver's own subclass, which other libraries do not know
            self._id = UUID(int=self._id.int)
        return self._id

    @property
    def topic(self) -> str:
        """Where the message belongs, in the words of the destination."""
        return self._topic

    @property
    def key(self) -> str | None:
        """What the message belongs together with, or None."""
        return self._key

    @property
    def headers(self) -> Mapping[str, str]:
        """Text by name, read-only."""
        if isinstance(self._headers, str):
            self._headers = MappingProxyType(orjson.loads(self._headers)) if self._headers != "{}" else _NO_HEADERS
        return self._headers

    @property
    def recorded_at(self) -> datetime | None:
        """When the message was recorded; None on the writer's side unless it was given."""
        if isinstance(self._recorded_at, bytes):
            # PostgreSQL's binary timestamptz: microseconds since 2000-01-01 UTC, big-endian. Decoded only when
            # somebody asks, since the driver's own decoding costs as much as all other columns together.
            microseconds = int.from_bytes(self._recorded_at, signed=True)
            try:
                self._recorded_at = _POSTGRES_EPOCH + timedelta(microseconds=microseconds)
            except OverflowError:  # PostgreSQL's infinities, which stand for Python's first and last moment
                self._recorded_at = _LAST if microseconds > 0 else _FIRST
        return self._recorded_at

    @property
    def due_at(self) -> datetime | None:
        """Not to be delivered before this time; None is at once, and on the relay's side always None."""
        return self._due_at

    @property
    def position(self) -> int | None:
        """The place in the outbox; None until it was stored. Gaps are normal, a lower one may commit later."""
        return self._position

    @property
    def dispatched_at(self) -> datetime | None:
        """When the message was marked as dispatched; None while it is pending."""
        return self._dispatched_at

    @property
    def attempts(self) -> int:
        """How many deliveries of this message have failed so far."""
        return self._attempts

    @property
    def body(self) -> bytes:
        """The encoded bytes.

        Raises:
            CodecError: When the payload cannot be encoded.
        """
        if self._body is None:
            self._body = self._encode(self._codec)[1]
        return self._body

    @property
    def payload(self) -> Any:
        """The decoded object.

        Raises:
            CodecError: When the body cannot be decoded.
        """
        if self._payload is _MISSING:
            assert self._body is not None
            try:
                self._payload = self._codec.decode(self._body, self.headers.get("type"))
            except CodecError as error:
                raise CodecError(f"message {self._id}: {error}") from error
        return self._payload

    def with_header(self, name: str, value: str) -> Self:
        """Returns a copy with this header set."""
        return self.with_headers({name: value})

    def with_headers(self, headers: Mapping[str, str]) -> Self:
        """Returns a copy with these headers set, over those it had."""
        copy = type(self).__new__(type(self))
        for slot in Message.__slots__:
            setattr(copy, slot, getattr(self, slot))
        copy._headers = MappingProxyType({**self.headers, **self._checked(headers)})
        return copy

    def _encode(self, codec: Codec) -> tuple[str, bytes]:
        """Returns the headers as a JSON text, with the codec's type name, and the body."""
        if self._body is not None and (self._position is not None or self._codec is not _PLAIN):
            # It came from a table or a broker: its bytes are forwarded.
            name, body = None, self._body
        else:
            try:
                name, body = codec.encode(self._payload)
            except CodecError as error:
                raise CodecError(f"message {self._id}: {error}") from error
        headers = self.headers if name is None else {**self.headers, "type": name}
        return (orjson.dumps(dict(headers)).decode() if headers else "{}"), body

    def _text(self, name: str, value: str) -> str:
        if not isinstance(value, str):
            raise TypeError(f"message {self._id}: {name} must be a str, not {type(value).__name__}")
        if "\0" in value:
            raise ValueError(f"message {self._id}: {name} contains NUL, which PostgreSQL text cannot hold: {value!r}")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"message {self._id}: {name} has a lone surrogate, no UTF-8: {value!r}") from error
        return value if type(value) is str else str.__str__(value)  # a member of a StrEnum is no name for JSON

    def _checked(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        if headers is _NO_HEADERS:
            return headers
        if not isinstance(headers, Mapping):
            raise TypeError(f"message {self._id}: headers must be a mapping, not {type(headers).__name__}")
        return MappingProxyType(
            {self._text("a header's name", name): self._text(f"header {name!r}", headers[name]) for name in headers}
        )

    def _aware(self, name: str, value: datetime | None) -> datetime | None:
        if value is not None:
            if not isinstance(value, datetime):
                raise TypeError(f"message {self._id}: {name} must be a datetime, not {type(value).__name__}")
            if value.utcoffset() is None:
                raise ValueError(f"message {self._id}: {name} has no time zone: use datetime.now(UTC) or the like")
        return value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Message):
            return NotImplemented
        # The codec adds the header `type` on the way, so it is no part of what makes two messages equal.
        return (
            (self.id, self.topic, self.key) == (other.id, other.topic, other.key)
            and {**self.headers, "type": ""} == {**other.headers, "type": ""}
            and bool(self.payload == other.payload)
        )

    def __hash__(self) -> int:
        return hash(self._id)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy needs, in this process or another: the payload, decoded, instead of the codec."""
        state = {slot: getattr(self, slot) for slot in Message.__slots__}
        return state | {"_payload": self.payload, "_headers": dict(self.headers), "_codec": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for slot, value in state.items():
            setattr(self, slot, value)
        self._headers = MappingProxyType(state["_headers"])
        self._codec = _PLAIN

    def __repr__(self) -> str:
        # No payload and no headers: a repr ends in logs, and they may hold what must not be logged.
        return f"Message(id={self._id}, topic={self._topic!r}, key={self._key!r}, position={self._position})"


_RANDOM: Final[list[int]] = []
"""80 random bits each: to ask the system for them costs half of what a whole message costs."""
if sys.platform != "win32":  # which has no fork: parent and child would use the same ones
    os.register_at_fork(after_in_child=_RANDOM.clear)


def uuid7() -> UUID:
    """Returns a new UUID of version 7: 48 bits of Unix milliseconds, then 74 random bits (RFC 9562, section 5.7)."""
    try:
        random = _RANDOM.pop()
    except IndexError:  # asked for in vain rather than before, since other threads take from it too
        fresh = memoryview(os.urandom(640))
        _RANDOM.extend([int.from_bytes(fresh[start : start + 10]) for start in range(10, 640, 10)])
        random = int.from_bytes(fresh[:10])
    value = (time.time_ns() // 1_000_000) << 80 | random
    value = value & ~(0xF << 76) | 0x7 << 76
    return UUID(int=value & ~(0x3 << 62) | 0x2 << 62)
