"""What of a message travels in headers, where a broker has no place of its own for it."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Final
from urllib.parse import quote, unquote
from uuid import UUID

from outbox._codec import Codec
from outbox._errors import RejectedError
from outbox._message import _RECEIVED, Message

PREFIX: Final = "outbox-"
"""How the names of this library's own headers begin; a message may have none that begins like it."""
ID: Final = f"{PREFIX}id"
TOPIC: Final = f"{PREFIX}topic"
KEY: Final = f"{PREFIX}key"
RECORDED_AT: Final = f"{PREFIX}recorded-at"

# A line break, a byte beyond ASCII or a space at an end does not survive in a line of text; nor would a percent sign
# that was there before. Everything else stays readable.
_UNSAFE: Final = re.compile(r"[^\x20-\x24\x26-\x7e]|^ | $")


def pack(message: Message, *native: str) -> dict[str, str]:
    """Returns the message's headers together with the library's own.

    Args:
        message: The message.
        native: Names of those the broker has a place of its own for, which are left out.

    Raises:
        RejectedError: When a header of the message has a name of the library's own.
    """
    headers = dict(message.headers)
    if taken := next((name for name in headers if name.lower().startswith(PREFIX)), None):
        raise RejectedError(f"message {message.id}: the header {taken!r} begins with {PREFIX!r}, which is taken")
    recorded_at = message.recorded_at
    own = {
        ID: str(message.id),
        TOPIC: message.topic,
        KEY: message.key,
        RECORDED_AT: recorded_at.isoformat() if recorded_at else None,
    }
    return headers | {name: value for name, value in own.items() if value is not None and name not in native}


@contextmanager
def reading() -> Iterator[None]:
    """Says of what cannot be read that it was not sent by this library."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"this was not sent by asyncpg-outbox: {error}") from error


def unpack(body: bytes, headers: Mapping[str, str], codec: Codec = _RECEIVED) -> Message:
    """Makes a message of a body and the headers that `pack` made, with the native ones put back.

    Raises:
        ValueError: When the id or the topic is missing, or one of them is none.
    """
    missing = next((name for name in (ID, TOPIC) if not headers.get(name)), None)
    if missing:
        raise ValueError(f"it has no {missing!r}")
    recorded_at = headers.get(RECORDED_AT)
    return Message.from_body(
        body,
        topic=headers[TOPIC],
        key=headers.get(KEY),
        headers={name: value for name, value in headers.items() if not name.startswith(PREFIX)},
        id=UUID(headers[ID]),
        recorded_at=datetime.fromisoformat(recorded_at) if recorded_at else None,
        codec=codec,
    )


def escape(text: str) -> str:
    """Percent-encodes what a line of ASCII cannot hold, and the percent sign; nothing else."""
    return _UNSAFE.sub(lambda match: quote(match[0], safe=""), text)


def unescape(text: str) -> str:
    """Gives back what was escaped."""
    return unquote(text)
