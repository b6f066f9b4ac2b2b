"""Which addresses a webhook may reach, checked where the connection is made, so that no name can lie about it."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final

import anyio
import httpcore
import httpx

from outbox._errors import OutboxError

_CLOSE_SECONDS: Final = 1

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Finds the addresses of a host, in the order in which they are tried."""

# All that IANA has given to hosts of the public internet; what is refused inside of it, `is_global` says.
_UNICAST: Final = ip_network("2000::/3")
# An IPv6 address that leads to the IPv4 address in it: mapped, by NAT64, by 6to4; and how many bits stand behind it.
_LEADS_TO_IPV4: Final = (
    (ip_network("::ffff:0:0/96"), 0),
    (ip_network("64:ff9b::/96"), 0),
    (ip_network("2002::/16"), 80),
)


class AddressRefusedError(OutboxError):
    """Raised when a host has only addresses that a webhook may not reach; nothing was sent."""


def networks(allowed: Iterable[str]) -> tuple[Network, ...]:
    """Reads networks, such as "10.1.0.0/16" or the one address "127.0.0.1".

    Raises:
        ValueError: When one of them is none.
    """
    return tuple(ip_network(one) for one in allowed)


def may_reach(address: Address, allowed: Iterable[Network] = ()) -> bool:
    """Says whether an address is of the public internet, or of a network that is allowed."""
    inner = _ipv4_inside(address)
    if any(one in network for network in allowed for one in (address, inner) if one is not None):
        return True
    if inner is not None:
        return may_reach(inner)
    if isinstance(address, IPv6Address) and address not in _UNICAST:
        return False
    return address.is_global and not address.is_multicast


def _ipv4_inside(address: Address) -> IPv4Address | None:
    if isinstance(address, IPv6Address):
        for network, behind in _LEADS_TO_IPV4:
            if address in network:
                return IPv4Address(int(address) >> behind & 0xFFFFFFFF)
    return None


async def _resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(where[0]) for *_, where in found]


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Resolves a host once, checks the addresses, and connects to one that was checked: not to the name again.

    TLS is told the host's name all the same, since that is done after the connection.

    Args:
        allowed: Networks that may be reached although they are not public.
        resolve: Finds the addresses of a host.
    """

    def __init__(self, allowed: Iterable[Network] = (), *, resolve: Resolve = _resolve) -> None:
        self._allowed = tuple(allowed)
        self._resolve = resolve
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 -- the signature is httpcore's
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connects to the first of the host's addresses that may be reached and answers."""
        failure: Exception = AddressRefusedError(
            f"{host!r} is not in the public internet: its addresses must be allowed by `allow_networks`"
        )
        for address in await self._resolve(host, port):
            if may_reach(ip_address(address), self._allowed):
                try:
                    return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
                except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                    failure = error
        raise failure

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        await asyncio.sleep(seconds)


class GuardedTransport(httpx.AsyncBaseTransport):
    """Sends requests over connections that were checked, of HTTP/2 where it is served.

    It is made of what httpcore documents, since httpx lets nobody choose how to connect: set from outside, an attribute
    with a new name in a new version would leave everything open. Errors are httpcore's.

    Args:
        backend: Makes the connections.
        tls: Checks certificates, and may have one of its own.
        connections: How many there are at most.
    """

    def __init__(self, backend: httpcore.AsyncNetworkBackend, tls: ssl.SSLContext | None, connections: int) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context() if tls is None else tls,
            max_connections=connections,
            keepalive_expiry=30,
            http2=True,
            network_backend=backend,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends the request; the response's body is read by whoever wants it."""
        url = request.url
        where = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        try:
            response = await self._pool.handle_async_request(
                httpcore.Request(
                    request.method,
                    where,
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        except asyncio.CancelledError:  # no answer in time
            await self._drop(where.origin)
            raise
        return httpx.Response(
            response.status, headers=response.headers, stream=_Body(response), extensions=response.extensions
        )

    async def _drop(self, origin: httpcore.Origin) -> None:
        """Closes what further requests would go through: of HTTP/2 it may be dead, and nothing else would notice."""
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
            for connection in self._pool.connections:
                if connection.can_handle_request(origin) and connection.is_available():
                    with suppress(Exception):  # it may well be broken
                        await connection.aclose()

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._pool.aclose()


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._response.aiter_stream():
            yield part

    async def aclose(self) -> None:
        await self._response.aclose()


def guarded_client(allowed: Iterable[Network], tls: ssl.SSLContext | None, connections: int) -> httpx.AsyncClient:
    """Makes a client that reaches public addresses only, and has no state that a receiver could fill."""
    cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))  # it keeps none
    transport: Any = GuardedTransport(GuardedBackend(allowed), tls, connections)
    # Neither a proxy nor a password is taken from the environment, where `SSL_CERT_FILE` is the only thing that counts.
    return httpx.AsyncClient(
        transport=transport,
        cookies=cookies,
        timeout=None,  # noqa: S113 -- each request has one for all of it
        trust_env=False,
    )
