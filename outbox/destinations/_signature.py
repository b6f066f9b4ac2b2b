"""Signatures as in Standard Webhooks 1.0, symmetric: what the sender adds and the receiver verifies."""

import binascii
import hashlib
import hmac
import time
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Final

from outbox._errors import OutboxError

ID: Final = "webhook-id"
TIMESTAMP: Final = "webhook-timestamp"
SIGNATURE: Final = "webhook-signature"

_PREFIX: Final = "whsec_"
_SHORTEST, _LONGEST = 24, 64
_VERSION: Final = "v1,"


class SignatureError(OutboxError):
    """Raised by `verify` when a request was not signed with any of the secrets, or not now: answer it with 401."""


def keys(secrets: Iterable[str]) -> tuple[bytes, ...]:
    """Reads secrets: `whsec_` and the base64 of 24 to 64 bytes.

    Raises:
        ValueError: When one of them is none. The error does not tell the secret.
    """
    if isinstance(secrets, str):
        raise TypeError("secrets must be several, [secret] for one, not a str")
    return tuple(_key(number, secret) for number, secret in enumerate(secrets, 1))


def _key(number: int, secret: str) -> bytes:
    if not secret.startswith(_PREFIX):
        raise ValueError(f"secret {number} must begin with {_PREFIX!r}")
    try:
        key = b64decode(secret.removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        raise ValueError(f"secret {number} must be base64 after {_PREFIX!r}") from None
    if not _SHORTEST <= len(key) <= _LONGEST:
        raise ValueError(f"secret {number} must have {_SHORTEST} to {_LONGEST} bytes, not {len(key)}")
    return key


def signed(keys: Iterable[bytes], message_id: str, body: bytes, timestamp: int) -> dict[str, str]:
    """Returns the headers of a signed request: with several keys one signature each, so that secrets can be changed."""
    signatures = " ".join(_signature(key, message_id, str(timestamp), body) for key in keys)
    return {ID: message_id, TIMESTAMP: str(timestamp), SIGNATURE: signatures}


def _signature(key: bytes, message_id: str, timestamp: str, body: bytes) -> str:
    content = b"%b.%b.%b" % (message_id.encode(), timestamp.encode(), body)
    return _VERSION + b64encode(hmac.digest(key, content, hashlib.sha256)).decode()


def verify(
    body: bytes,
    headers: Mapping[str, str],
    secrets: Iterable[str],
    *,
    tolerance: timedelta = timedelta(minutes=5),
    now: float | None = None,
) -> None:
    """Verifies a request that was received: its id, time and body, in constant time for each signature.

    Other headers are not signed. In the binary mode of CloudEvents the topic and the key are such headers; in the
    structured mode all of the message is in the body.

    Args:
        body: The body, as it came.
        headers: The headers, in whatever case.
        secrets: Any of them may have signed it.
        tolerance: How far its time may be from now, against requests that are sent again by somebody else.
        now: In seconds since 1970; the clock's time unless given.

    Raises:
        SignatureError: When it is not to be trusted.
        ValueError: When a secret is none.
    """
    found = {name.lower(): value for name, value in headers.items()}
    if missing := next((name for name in (ID, TIMESTAMP, SIGNATURE) if not found.get(name)), None):
        raise SignatureError(f"the request has no header {missing!r}")
    moment = found[TIMESTAMP]
    if not (moment.isascii() and moment.isdigit()):
        raise SignatureError(f"the header {TIMESTAMP!r} must be in whole seconds since 1970")
    if abs((time.time() if now is None else now) - int(moment)) > tolerance.total_seconds():
        raise SignatureError(f"the request was signed longer than {tolerance} ago, or ahead")
    # Bytes, since only ASCII text can be compared in constant time, and this came from anybody.
    wanted = [_signature(key, found[ID], moment, body).encode() for key in keys(secrets)]
    given = [one.encode() for one in found[SIGNATURE].split(" ")]
    if not any(hmac.compare_digest(one, other) for one in wanted for other in given):
        raise SignatureError("no signature of the request was made with a secret of yours")
