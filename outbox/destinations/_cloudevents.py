"""A message as a CloudEvent 1.0, in the binary and the structured mode of its HTTP binding, and back."""

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, Literal
from urllib.parse import quote, unquote
from uuid import UUID

import orjson

from outbox._codec import Codec
from outbox._message import Message
from outbox.destinations._envelope import reading

Mode = Literal["binary", "structured"]

HEADERS: Final = "outboxheaders"
"""The extension attribute that holds all headers of a message, as a JSON object: names of attributes have no hyphen."""
TRACE: Final = ("traceparent", "tracestate")
"""Headers that are attributes of their own as well, by the extension for distributed tracing."""

_STRUCTURED: Final = "application/cloudevents+json"
_JSON: Final = re.compile(r"[^/;]+/(?:json|[^/;]+\+json)\s*(?:;.*)?", re.IGNORECASE)
# What HTTP's lines cannot hold, and the space, the quotes and the percent sign: section 3.1.3.2 of the binding.
_UNSAFE: Final = re.compile(r"[^\x21\x23\x24\x26-\x7e]+")

Request = tuple[dict[str, str], bytes]
"""The headers and the body."""


def request(message: Message, mode: Mode, source: str, content_type: str) -> Request:
    """Makes the request that carries a message."""
    attributes = _attributes(message, source)
    if mode == "binary":
        headers = {f"ce-{name}": _escape(value) for name, value in attributes.items()}
        return headers | {"content-type": content_type}, message.body
    event = attributes | {"datacontenttype": content_type} | _data(message.body, content_type)
    return {"content-type": _STRUCTURED}, orjson.dumps(event)


def _attributes(message: Message, source: str) -> dict[str, Any]:
    headers, recorded_at = message.headers, message.recorded_at
    own = {
        "specversion": "1.0",
        "id": str(message.id),
        "source": source,
        "type": message.topic,
        "time": recorded_at.isoformat() if recorded_at else None,
        "partitionkey": message.key,
        HEADERS: json.dumps(dict(headers), separators=(",", ":")) if headers else None,
    }
    trace = {name: headers.get(name) or None for name in TRACE}
    return {name: value for name, value in (own | trace).items() if value is not None}


def _data(body: bytes, content_type: str) -> dict[str, Any]:
    """Puts JSON in as JSON if the same bytes come of it again, and everything else as base64."""
    if _JSON.fullmatch(content_type):
        try:
            if orjson.dumps(orjson.loads(body)) == body:
                return {"data": orjson.Fragment(body)}
        except orjson.JSONDecodeError:
            pass
    return {"data_base64": b64encode(body).decode()}


@reading()
def message_of(headers: Mapping[str, str], body: bytes, codec: Codec) -> Message:
    """Makes the message of a request.

    Raises:
        ValueError: When it is no CloudEvent, or not one of this library.
    """
    found = {name.lower(): value for name, value in headers.items()}
    if found.get("content-type", "").lower().startswith(_STRUCTURED):
        event, body = _opened(body)
    else:
        event = {name[3:]: unquote(value, errors="strict") for name, value in found.items() if name.startswith("ce-")}
    if missing := next((name for name in ("id", "type") if not event.get(name)), None):
        raise ValueError(f"the event has no {missing!r}")
    time = event.get("time")
    return Message.from_body(
        body,
        topic=event["type"],
        key=event.get("partitionkey"),
        headers=_headers(event.get(HEADERS, "{}")),
        id=UUID(event["id"]),
        recorded_at=datetime.fromisoformat(time) if time else None,
        codec=codec,
    )


def _opened(body: bytes) -> tuple[dict[str, str], bytes]:
    """Returns the attributes and the data of an event in its JSON format."""
    event = orjson.loads(body)
    if not isinstance(event, dict):
        raise ValueError("the event is no JSON object")  # noqa: TRY004 -- it came from outside
    attributes = {name: value for name, value in event.items() if isinstance(value, str)}
    if "data_base64" in attributes:
        return attributes, b64decode(attributes["data_base64"])
    return attributes, orjson.dumps(event.get("data"))


def _headers(text: str) -> dict[str, str]:
    headers = orjson.loads(text)
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise ValueError(f"{HEADERS!r} is no JSON object of texts")
    return headers


def _escape(text: str) -> str:
    return _UNSAFE.sub(lambda match: quote(match[0], safe=""), text)
