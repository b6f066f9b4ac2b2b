"""Webhooks, through httpx."""

import asyncio
import re
import ssl
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Final, Self
from uuid import UUID

import anyio

from outbox._codec import Codec
from outbox._dispatcher import HandlerDispatcher
from outbox._errors import (
    DestinationUnavailableError,
    OutboxError,
    PartialDispatchError,
    RejectedError,
    describe,
    needs,
)
from outbox._message import _RECEIVED, Message
from outbox._queries import Ordering
from outbox.destinations._answers import caused
from outbox.destinations._cloudevents import TRACE, Mode, message_of, request
from outbox.destinations._envelope import escape
from outbox.destinations._signature import ID, SignatureError, keys, signed, verify

with needs("webhook"):
    import httpcore
    import httpx

    from outbox.destinations._addresses import AddressRefusedError, guarded_client, networks

__all__ = [
    "AddressRefusedError",
    "AnswerError",
    "Endpoint",
    "SignatureError",
    "WebhookDispatcher",
    "received",
    "verify",
]

_DOWN: Final = (
    httpx.TransportError,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    OSError,  # a name that cannot be resolved is one
    TimeoutError,
)
# It was there, took what it was sent, and cut the connection over it: a process may crash on a message.
_CUT: Final = (
    httpx.ReadError,
    httpx.WriteError,
    httpx.RemoteProtocolError,
    httpcore.ReadError,
    httpcore.WriteError,
    httpcore.RemoteProtocolError,
)
_NEVER: Final = {400, 410, 413, 414, 415, 422, 431}
_BUSY: Final = {429, 502, 503, 504}
_MOVED: Final = {307, 308}  # the others make a GET of a POST
_LONGEST_PAUSE: Final = timedelta(hours=1)
_MOST_OF_BODY: Final = 64 * 1024
_TOLD_OF_BODY: Final = 200
_MOST_OF_HEADERS: Final = 64 * 1024
"""Of a message, in bytes. To compress them for HTTP/2 takes the square of their length: a megabyte, over a minute."""
_FORWARDED: Final = re.compile(r"(?!ce-|webhook-|content-|proxy-)[a-z0-9-]+")
_OWN: Final = {
    *("accept", "accept-encoding", "authorization", "connection", "cookie", "date", "expect", "forwarded", "host"),
    *("keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "user-agent"),
}
_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE: Final = re.compile(r"[!-~](?:[ \t!-~]*[!-~])?")
_HEADERS: Final = {"accept-encoding": "identity", "user-agent": "asyncpg-outbox"}


class AnswerError(OutboxError):
    """An answer that is not 2xx; a back-off may look at it, or at the `__cause__` of an error that has it there.

    Args:
        text: What happened.
        status: The status code.
        retry_after: For how long the receiver asked to be left alone.
    """

    def __init__(self, text: str, *, status: int, retry_after: timedelta | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to post, and what is this receiver's alone.

    Raises:
        ValueError: When the URL is none of HTTP, has a user or password in it, or when a header or a secret is none.
    """

    url: str
    secrets: Sequence[str] = field(default=(), repr=False)
    """Each signs every request, as in Standard Webhooks: `whsec_` and the base64 of 24 to 64 random bytes."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent with every request, `{"Authorization": "Bearer …"}` for one; not to another host that redirects lead to."""
    _keys: tuple[bytes, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _checked(_parsed(self.url))
        for name, value in self.headers.items():
            if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
                raise ValueError(f"the header {name!r} is none of HTTP: its name or its value has characters beyond it")
        object.__setattr__(self, "_keys", keys(self.secrets))


def _parsed(url: str) -> httpx.URL:
    try:
        return httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"the webhook's URL is none: {error}") from error


def _checked(url: httpx.URL) -> httpx.URL:
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError(f"{_origin(url)}: a webhook's URL must be https://host/… or http://host/…")
    if url.userinfo:
        raise ValueError(f"{_origin(url)}: give user and password as headers, since a URL ends in logs")
    return url


def _origin(url: httpx.URL) -> str:
    """Says where a URL leads, without the rest of it, which may be a secret."""
    return f"{url.scheme}://{url.netloc.decode()}"


@dataclass(slots=True)
class _Batch:
    """What is known of the receiver while one batch is on its way."""

    down: BaseException | None = None
    cut: dict[str, OutboxError] = field(default_factory=dict)
    """By origin, one error for all whose connection was cut, so that the relay finds out over which of them."""


class WebhookDispatcher:
    """Posts each message as a CloudEvent; an answer of 2xx says that it was accepted.

    The messages of a key go out one after the other, others at the same time; by HTTP/2 where the receiver serves it.

    With one endpoint a receiver that cannot be reached, does not answer or is overloaded (429, 502, 503, 504) is
    unavailable: no attempt is spent, and it is left alone for as long as `Retry-After` says. With several, by a
    function, none must hold back the others: the same is then a failure of the message, to be tried again. So is a
    connection that the receiver cuts instead of an answer, since it may do so over this message each time.
    400, 410, 413, 414, 415, 422 and 431 reject the message. Everything else is a failure that somebody may mend.

    Only public addresses are reached, whatever a name resolves to and wherever a redirect leads.

    Args:
        endpoint: Where to post, or a function that says it for each message.
        source: Who sends, the CloudEvents attribute `source`: a URI or a path such as "/orders".
        mode: "binary": the body is the message's, the rest is in headers, and rejected beyond 64 KiB. "structured": all
            of it is a JSON object, and so all of it is signed.
        content_type: Of the messages' bodies.
        forward: Names of message headers, in lower case, that are also sent as HTTP headers. `traceparent` and
            `tracestate` always are. All headers of a message travel in the event anyway.
        order: That of the relay. Those behind a failure, of its key or with "total" all, are then not sent, and fail.
        concurrency: How many requests are under way at once.
        timeout: How long a request may take, from the connection to the end of the answer.
        redirects: How many of 307 and 308 are followed; others never are, since they would lose the body.
        allow_http: Whether URLs without TLS are taken.
        allow_networks: Networks that may be reached although they are not public: ["10.1.0.0/16"].
        tls: Which certificates are trusted, and which one is shown.
        client: A client of your own, for a proxy for example. It stays yours to close; which addresses it reaches is
            then on you, and `allow_networks` and `tls` have no meaning.

    Raises:
        ValueError: When a setting is wrong.
    """

    def __init__(
        self,
        endpoint: Endpoint | Callable[[Message], Endpoint],
        *,
        source: str,
        mode: Mode = "binary",
        content_type: str = "application/json",
        forward: Iterable[str] = (),
        order: Ordering = "none",
        concurrency: int = 20,
        timeout: timedelta = timedelta(seconds=10),
        redirects: int = 0,
        allow_http: bool = False,
        allow_networks: Iterable[str] = (),
        tls: ssl.SSLContext | None = None,
        client: httpx.AsyncClient | None = None,
    ) -> None:
        self._forward = (*TRACE, *forward)
        if wrong := next((one for one in self._forward if one in _OWN or not _FORWARDED.fullmatch(one)), None):
            raise ValueError(f"{wrong!r} cannot be forwarded: it is none of HTTP, or one of its own")
        if mode not in {"binary", "structured"}:
            raise ValueError(f"mode must be 'binary' or 'structured', not {mode!r}")
        if not source or not _VALUE.fullmatch(content_type):
            raise ValueError("source and content_type must not be empty, and content_type a value of HTTP")
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency!r}")
        self._endpoint = endpoint
        self._event = partial(request, mode=mode, source=source, content_type=content_type)
        self._order = order
        self._slots = asyncio.Semaphore(concurrency)
        self._timeout = timeout.total_seconds()
        self._redirects = redirects
        self._schemes = {"http", "https"} if allow_http else {"https"}
        self._is_mine = client is None
        self._client = client or guarded_client(networks(allow_networks), tls, concurrency)
        self._answered_at = self._silent_until = 0.0
        if isinstance(endpoint, Endpoint):
            self._require_scheme(_parsed(endpoint.url))

    async def dispatch(self, *messages: Message) -> None:
        """Posts the messages and awaits all answers.

        Raises:
            PartialDispatchError: With the error of each message that was not accepted.
        """
        one_by_one = HandlerDispatcher(partial(self._deliver, _Batch()), order=self._order)
        lanes = self._lanes(messages)
        answers = await asyncio.gather(*(one_by_one.dispatch(*lane) for lane in lanes), return_exceptions=True)
        failures: dict[UUID, BaseException] = {}
        for lane, answer in zip(lanes, answers, strict=True):
            if isinstance(answer, PartialDispatchError):
                failures |= answer.failures
            elif answer is not None:
                failures |= dict.fromkeys((message.id for message in lane), answer)
        if failures:
            raise PartialDispatchError(failures)

    def _lanes(self, messages: Sequence[Message]) -> list[list[Message]]:
        """Parts the messages so that those of a part must go one after the other."""
        lanes: dict[object, list[Message]] = defaultdict(list)
        for message in messages:
            lane = "all" if self._order == "total" else message.id if message.key is None else message.key
            lanes[lane].append(message)
        return list(lanes.values())

    async def _deliver(self, batch: _Batch, message: Message) -> None:
        """Posts a message.

        Raises:
            RejectedError: When the receiver will never take it.
            DestinationUnavailableError: When the one receiver there is cannot take anything now.
            OutboxError: When it was not accepted for another reason.
        """
        endpoint = self._endpoint if isinstance(self._endpoint, Endpoint) else self._endpoint(message)
        async with self._slots:
            self._require_available(batch)
            began = time.monotonic()
            try:
                await self._post_again(endpoint, message, began + self._timeout)
            except _DOWN as error:
                origin = _origin(_parsed(endpoint.url))
                failure = OutboxError(f"{origin} does not answer: {describe(error)}")
                if isinstance(error, _CUT):
                    raise batch.cut.setdefault(origin, failure) from error
                # If it has answered others meanwhile then it is well, and this message is what it cannot answer.
                is_well = isinstance(error, TimeoutError) and self._answered_at >= began
                raise failure if is_well else self._unavailable(batch, failure) from error
            except AnswerError as error:
                if error.status in _NEVER:
                    raise RejectedError(str(error)) from error
                if error.status in _BUSY:
                    self._silence(error.retry_after)
                    raise self._unavailable(batch, error) from error
                raise

    def _require_available(self, batch: _Batch) -> None:
        """Raises when it is known that the receiver takes nothing now: a batch must not wait for each message."""
        if batch.down is not None:
            raise caused(DestinationUnavailableError(f"not tried, since another failed: {batch.down}"), batch.down)
        if (left := self._silent_until - time.monotonic()) > 0:
            raise DestinationUnavailableError(f"not tried: the receiver asked to be left alone, for {left:.0f} s more")

    def _unavailable(self, batch: _Batch, error: OutboxError) -> OutboxError:
        """Returns what a message fails with whose receiver is away."""
        if not isinstance(self._endpoint, Endpoint):
            return error
        batch.down = error
        return DestinationUnavailableError(str(error))

    def _silence(self, retry_after: timedelta | None) -> None:
        if retry_after and isinstance(self._endpoint, Endpoint):
            pause = min(retry_after, _LONGEST_PAUSE).total_seconds()
            self._silent_until = max(self._silent_until, time.monotonic() + pause)

    async def _post_again(self, endpoint: Endpoint, message: Message, deadline: float) -> None:
        """Posts a message, and once more when the connection was cut: it may have been dead before it was used."""
        try:
            await self._post(endpoint, message, deadline)
        except _CUT:
            await self._post(endpoint, message, deadline)

    async def _post(self, endpoint: Endpoint, message: Message, deadline: float) -> None:
        """Posts a message, also to where redirects lead, and returns when the answer is 2xx."""
        headers, body = self._event(message)
        forwarded = {name: escape(message.headers[name]) for name in self._forward if message.headers.get(name)}
        if (size := sum(map(len, (*headers.values(), *forwarded.values())))) > _MOST_OF_HEADERS:
            raise RejectedError(f"message {message.id}: {size} bytes are too much for headers: take mode='structured'")
        headers |= _HEADERS
        if endpoint._keys:
            headers |= signed(endpoint._keys, str(message.id), body, int(time.time()))
        theirs = {name.lower(): value for name, value in endpoint.headers.items()}
        url, left = _parsed(endpoint.url), self._redirects
        while True:
            self._require_scheme(url)
            response, text = await self._send(url, forwarded | theirs | headers, body, deadline)
            if response.status_code not in _MOVED or not left:
                return _require_success(url, response, text)
            onward = _checked(url.join(response.headers.get("location", "")))
            if _origin(onward) != _origin(url):
                theirs = {}
            url, left = onward, left - 1

    async def _send(
        self, url: httpx.URL, headers: Mapping[str, str], body: bytes, deadline: float
    ) -> tuple[httpx.Response, bytes]:
        """Sends one request; returns the answer and the beginning of its body, of which no more is read."""
        post = self._client.build_request("POST", url, headers=headers, content=body)
        with anyio.fail_after(deadline - time.monotonic()):
            response = await self._client.send(post, stream=True, follow_redirects=False)
        self._answered_at = time.monotonic()
        text = b""
        try:
            # The status is the answer: whatever happens to the body, it was accepted or it was not.
            with anyio.move_on_after(deadline - time.monotonic()), suppress(*_DOWN):
                async for part in response.aiter_raw():
                    text += part
                    if len(text) > _MOST_OF_BODY:
                        break
        finally:
            with suppress(*_DOWN):
                await response.aclose()
        return response, text

    def _require_scheme(self, url: httpx.URL) -> None:
        if url.scheme not in self._schemes:
            raise ValueError(f"{_origin(url)}: without TLS everybody reads along; allow_http=True takes it anyway")

    async def aclose(self) -> None:
        """Closes the connections, if the client is not yours."""
        if self._is_mine:
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _require_success(url: httpx.URL, response: httpx.Response, text: bytes) -> None:
    if response.is_success:
        return
    said = ascii(text[:_TOLD_OF_BODY].decode("utf-8", "replace")) if text else "nothing more"
    hint = ", which is not followed" if response.is_redirect else ""
    raise AnswerError(
        f"{_origin(url)} answered {response.status_code}{hint}, and said {said}",
        status=response.status_code,
        retry_after=_retry_after(response.headers.get("retry-after", "")),
    )


def _retry_after(value: str) -> timedelta | None:
    """Reads the header `Retry-After`: seconds, or a date."""
    try:
        if value.isdigit():
            return timedelta(seconds=min(int(value), _LONGEST_PAUSE.total_seconds()))
        return max(parsedate_to_datetime(value) - datetime.now(UTC), timedelta())
    except (ValueError, TypeError):  # it is not said, or nonsense, or a date without a zone
        return None


def received(headers: Mapping[str, str], body: bytes, codec: Codec = _RECEIVED) -> Message:
    """Makes the message that was dispatched of a request, as a web framework gives it. Verify it before.

    Args:
        headers: The headers, in whatever case.
        body: The body, as it came.
        codec: Decodes the payload, when somebody reads it.

    Raises:
        ValueError: When it was not sent by this library.
    """
    message = message_of(headers, body, codec)
    signed_id = next((value for name, value in headers.items() if name.lower() == ID), str(message.id))
    if signed_id != str(message.id):  # of the two only this one is signed
        raise ValueError(f"the event {message.id} came with the signature of another, {signed_id!r}")
    return message
