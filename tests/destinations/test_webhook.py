"""Webhooks, to a receiver of our own that writes to disk before it answers."""

import base64
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import asyncpg
import httpcore
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from outbox import DestinationUnavailableError, Message, Outbox, RejectedError
from outbox.destinations._addresses import GuardedBackend, may_reach, networks  # noqa: TID251 -- the guard alone
from outbox.destinations.webhook import (
    AddressRefusedError,
    AnswerError,
    Endpoint,
    SignatureError,
    WebhookDispatcher,
    received,
    verify,
)
from outbox.testing import CONTRACT, Case
from tests.destinations.brokers import Process, ProcessBroker, free_port, listens, program
from tests.destinations.failures import failures_of
from tests.destinations.receiver import LARGEST
from tests.destinations.relaying import check_the_whole_way
from tests.faults import FaultProxy

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # noqa: S105 -- the published one, which protects nothing
OTHER = "whsec_" + base64.b64encode(b"x" * 32).decode()
HERE = ["127.0.0.1"]


class Receiver(ProcessBroker):
    topic = "orders.placed"
    too_large: int | None = LARGEST + 1
    unroutable: str | None = "nobody"

    def __init__(self, folder: Path, *tls: Path, **settings: Any) -> None:
        port = free_port()
        self.url = f"{'https' if tls else 'http'}://localhost:{port}"
        self.file = folder / "received"
        self.settings = settings
        command = [program("python"), "-m", "tests.destinations.receiver", str(port), str(self.file), *map(str, tls)]
        self.process = Process(command, partial(listens, port))
        self._read = 0
        self._arrived: list[Message] = []
        self.requests: list[dict[str, Any]] = []

    def to(self, path: str = "/", **settings: Any) -> WebhookDispatcher:
        return self.by(Endpoint(self.url + path), **settings)

    def by(self, endpoint: Endpoint | Callable[[Message], Endpoint], **settings: Any) -> WebhookDispatcher:
        own: Mapping[str, Any] = {
            "allow_http": True,
            "allow_networks": HERE,
            "timeout": timedelta(seconds=2),
            "concurrency": 8,
        }
        return WebhookDispatcher(endpoint, source="/orders", **{**own, **self.settings, **settings})

    def destination(self) -> WebhookDispatcher:
        return self.to()

    async def received(self, count: int) -> Sequence[Message]:
        while len(self._arrived) < count:
            with self.file.open("rb") as file:
                file.seek(self._read)
                lines = file.read().rpartition(b"\n")[0]
            if not lines:
                await anyio.sleep(0.01)  # why a sleep: the file is another process's, and has no event
                continue
            self._read += len(lines) + 1
            for line in lines.splitlines():
                self.requests.append(json.loads(line))
                self._arrived.append(received(self.requests[-1]["headers"], self.body(-1)))
        return self._arrived

    def body(self, number: int) -> bytes:
        return base64.b64decode(self.requests[number]["body"])


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Receiver]:
    async for broker in running(Receiver(tmp_path)):
        yield broker


async def running(broker: Receiver) -> AsyncIterator[Receiver]:
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.__name__)
async def test_the_contract(case: Case, broker: Receiver) -> None:
    await case(broker)


@pytest.mark.parametrize("case", CONTRACT[:4], ids=lambda case: case.__name__)
async def test_what_arrives_in_the_structured_mode(case: Case, broker: Receiver) -> None:
    broker.settings = {"mode": "structured"}
    await case(broker)


async def test_the_whole_way(broker: Receiver, pool: "asyncpg.Pool[Any]", outbox: Outbox) -> None:
    await check_the_whole_way(broker, pool, outbox)


# --- what is sent -----------------------------------------------------------------------------------------


async def test_a_message_is_a_cloudevent_in_the_binary_mode(broker: Receiver) -> None:
    headers = {"traceparent": "00-1-2-01", "tracestate": "a=b, c=d", "tenant": "Grüße ", "host": "evil", "b": "c"}
    message = Message.from_body(
        b"[1]", topic="orders.placed", key='a "key"', headers=headers, recorded_at=datetime(2024, 2, 29, tzinfo=UTC)
    )
    async with broker.to(forward=["tenant"]) as destination:
        await destination.dispatch(message)
    await broker.received(1)
    sent = broker.requests[0]["headers"]
    assert {name: value for name, value in sent.items() if name.startswith("ce-")} == {
        "ce-specversion": "1.0",
        "ce-id": str(message.id),
        "ce-source": "/orders",
        "ce-type": "orders.placed",
        "ce-time": "2024-02-29T00:00:00+00:00",
        "ce-partitionkey": "a%20%22key%22",
        "ce-traceparent": "00-1-2-01",
        "ce-tracestate": "a=b,%20c=d",
        "ce-outboxheaders": sent["ce-outboxheaders"],
    }
    assert (sent["content-type"], sent["traceparent"], sent["tracestate"]) == (
        "application/json",
        "00-1-2-01",
        "a=b, c=d",
    )
    assert (sent["tenant"], sent["host"], "b" in sent) == ("Gr%C3%BC%C3%9Fe%20", broker.url.partition("//")[2], False)


async def test_a_message_is_a_cloudevent_in_the_structured_mode(broker: Receiver) -> None:
    json_again = Message.from_body(b'{"a":1.5}', topic="orders.placed", key="k", headers={"a": "b"})
    spaced = Message.from_body(b'{"a": 1.5}', topic="orders.placed")
    async with broker.to(mode="structured") as destination:
        await destination.dispatch(json_again)
        await destination.dispatch(spaced)
    await broker.received(2)
    assert broker.requests[0]["headers"]["content-type"] == "application/cloudevents+json"
    assert json.loads(broker.body(0)) == {
        "specversion": "1.0",
        "id": str(json_again.id),
        "source": "/orders",
        "type": "orders.placed",
        "partitionkey": "k",
        "outboxheaders": '{"a":"b"}',
        "datacontenttype": "application/json",
        "data": {"a": 1.5},
    }
    assert json.loads(broker.body(1))["data_base64"] == base64.b64encode(spaced.body).decode()


@pytest.mark.parametrize("name", ["host", "Tenant", "ce-id", "webhook-id", "content-length", "authorization", "a b"])
def test_what_is_http_s_own_cannot_be_forwarded(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be forwarded"):
        WebhookDispatcher(Endpoint("https://example.com"), source="/orders", forward=[name])


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/",
        "example.com",
        "https://user:hunter2@example.com/",
        "https:///path",
        "https://example.com:port",
    ],
)
def test_a_url_that_will_not_do_is_refused_at_the_door(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL|user and password") as caught:
        Endpoint(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "header", [("a b", "c"), ("a:", "c"), ("", "c"), ("a", "hunter2\r\nb: c"), ("a", "hunter2…"), ("a", "")]
)
def test_a_header_that_is_none_is_refused_and_its_value_not_told(header: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="none of HTTP") as caught:
        Endpoint("https://example.com", headers=dict([header]))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [{"content_type": "a\r\nb: c"}, {"content_type": ""}, {"source": ""}, {"mode": "batched"}, {"concurrency": 0}],
)
def test_a_setting_that_is_wrong_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        WebhookDispatcher(Endpoint("https://example.com"), **{"source": "/orders", **setting})


def test_a_url_without_tls_is_taken_only_when_it_was_asked_for() -> None:
    with pytest.raises(ValueError, match="allow_http"):
        WebhookDispatcher(Endpoint("http://example.com"), source="/orders")


@pytest.mark.parametrize(
    "case", [case for case in CONTRACT if "ten_thousand" not in case.__name__], ids=lambda case: case.__name__
)
async def test_http_2_is_spoken_where_it_is_served(case: Case, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    tls = ssl.create_default_context(cafile=str(certificate))
    async for broker in running(Receiver(tmp_path, certificate, key, tls=tls, allow_http=False)):
        await case(broker)
        assert {one["version"] for one in broker.requests} == {"HTTP/2"}


async def test_a_connection_of_http_2_that_is_dead_is_not_used_again(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    tls = ssl.create_default_context(cafile=str(certificate))
    async for broker in running(Receiver(tmp_path, certificate, key, tls=tls, timeout=timedelta(seconds=0.5))):
        async with FaultProxy(int(broker.url.rpartition(":")[2])) as way:
            broker.url = f"https://localhost:{way.port}"
            async with broker.to() as destination:
                await destination.dispatch(Message(1, topic="orders"))
                way.black_hole()
                way.heal()
                error = (await failures_of(destination, Message(2, topic="orders"))).popitem()[1]
                assert isinstance(error, DestinationUnavailableError)
                await destination.dispatch(Message(3, topic="orders"))


async def test_a_certificate_for_another_name_is_not_trusted(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    tls = ssl.create_default_context(cafile=str(certificate))
    async for broker in running(Receiver(tmp_path, certificate, key, tls=tls)):
        broker.url = broker.url.replace("localhost", "127.0.0.1")
        error = await failure(broker.to())
        assert "certificate" in str(error)
        assert not broker.file.read_bytes()


# --- what is answered -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, RejectedError) for status in (400, 410, 413, 414, 415, 422, 431)),
        *((status, DestinationUnavailableError) for status in (429, 502, 503, 504)),
        *((status, AnswerError) for status in (300, 301, 307, 401, 403, 404, 408, 409, 425, 500, 501, 600)),
    ],
)
async def test_an_answer_is_sorted(broker: Receiver, status: int, kind: type[Exception]) -> None:
    error = await failure(broker.to(f"/status/{status}"))
    assert type(error) is kind
    assert f"answered {status}" in str(error)
    assert r"because I say so\x00" in str(error)
    answer = error if isinstance(error, AnswerError) else error.__cause__
    assert isinstance(answer, AnswerError)
    assert answer.status == status


async def test_one_receiver_of_several_that_is_away_does_not_make_all_unavailable(broker: Receiver) -> None:
    nobody = free_port()

    def endpoint(message: Message) -> Endpoint:
        if message.topic == "raises":
            raise LookupError("no such receiver")
        return Endpoint(
            {"here": broker.url, "busy": f"{broker.url}/status/503"}.get(message.topic, f"http://localhost:{nobody}")
        )

    here, busy, away, raises = [Message(1, topic=topic) for topic in ("here", "busy", "away", "raises")]
    async with broker.by(endpoint) as destination:
        failures = await failures_of(destination, here, busy, away, raises)
    assert list(failures) == [busy.id, away.id, raises.id]
    assert not any(isinstance(error, DestinationUnavailableError) for error in failures.values())
    assert isinstance(failures[raises.id], LookupError)
    assert [message.id for message in await broker.received(1)] == [here.id]


@pytest.mark.parametrize("value", ["120", "date"])
async def test_a_receiver_that_asks_for_it_is_left_alone(broker: Receiver, value: str) -> None:
    later = (datetime.now(UTC) + timedelta(seconds=120)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    asked = Endpoint(f"{broker.url}/status/429", headers={"X-Ask": later if value == "date" else value})
    async with broker.by(asked) as destination:
        first = (await failures_of(destination, Message(1, topic="orders"))).popitem()[1]
        assert isinstance(first.__cause__, AnswerError)
        assert first.__cause__.retry_after is not None
        assert timedelta(seconds=110) < first.__cause__.retry_after <= timedelta(seconds=120)
        await broker.stop()
        again = (await failures_of(destination, Message(1, topic="orders"))).popitem()[1]
    assert isinstance(again, DestinationUnavailableError)
    assert "asked to be left alone" in str(again)


async def test_those_behind_a_failure_of_their_key_are_not_sent_in_order(broker: Receiver) -> None:
    topics = ["nobody", "orders", "orders"]
    bad, behind, other = [Message(1, topic=topic, key=key) for topic, key in zip(topics, "aab", strict=True)]
    async with broker.to(order="key") as destination:
        assert list(await failures_of(destination, bad, behind, other)) == [bad.id, behind.id]
    assert [message.id for message in await broker.received(1)] == [other.id]


async def test_a_whole_batch_waits_once_for_a_receiver_that_does_not_answer(broker: Receiver) -> None:
    batch = [Message(number, topic="orders") for number in range(200)]
    async with broker.to(timeout=timedelta(seconds=0.5), concurrency=10) as destination:
        await broker.freeze()
        began = time.monotonic()
        assert len(await failures_of(destination, *batch)) == 200
        assert time.monotonic() - began < 2


async def test_a_message_that_a_receiver_chokes_on_is_to_blame_itself(broker: Receiver) -> None:
    bad, *good = [Message(1, topic=topic) for topic in ("hangs", "orders", "orders")]
    async with broker.to(timeout=timedelta(seconds=1)) as destination:
        failures = await failures_of(destination, bad, *good)
        assert list(failures) == [bad.id]
        assert not isinstance(failures[bad.id], DestinationUnavailableError)
        assert {one.id for one in await broker.received(2)} == {one.id for one in good}
        alone = await failures_of(destination, bad)
        assert isinstance(alone[bad.id], DestinationUnavailableError)


async def test_a_message_over_which_a_receiver_cuts_the_connection_fails_by_itself(broker: Receiver) -> None:
    """Taken for a receiver that is down it would be sent for ever, and the others of its batch not at all."""
    bad, worse, *good = [Message(1, topic=topic) for topic in ("crashes", "crashes", *["orders"] * 50)]
    async with broker.to() as destination:
        failures = await failures_of(destination, bad, *good)
        assert list(failures) == [bad.id]
        assert not isinstance(failures[bad.id], DestinationUnavailableError)
        assert {one.id for one in await broker.received(50)} == {one.id for one in good}
        both = await failures_of(destination, bad, worse)
        assert both[bad.id] is both[worse.id]  # so that the relay blames neither, and tries each alone


async def test_a_receiver_that_drips_bytes_ends_at_the_timeout(broker: Receiver) -> None:
    with anyio.fail_after(5):
        error = await failure(broker.to("/drip", timeout=timedelta(seconds=0.5)))
    assert isinstance(error, DestinationUnavailableError)


async def test_of_an_answer_without_end_only_the_beginning_is_read(broker: Receiver) -> None:
    async with broker.to("/flood", timeout=timedelta(minutes=1)) as destination:
        with anyio.fail_after(5):
            for number in range(3):
                await destination.dispatch(Message(number, topic="orders"))
    assert len(await broker.received(3)) == 3


async def test_what_was_accepted_stays_so_when_the_rest_of_the_answer_does_not_come(broker: Receiver) -> None:
    async with broker.to("/stall", timeout=timedelta(seconds=0.3)) as destination:
        with anyio.fail_after(5):
            await destination.dispatch(message := Message(1, topic="orders"))
    assert [one.id for one in await broker.received(1)] == [message.id]


# --- where it goes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed_unless_asked_for(broker: Receiver, status: int) -> None:
    error = await failure(broker.to(f"/redirect/{status}//"))
    assert "not followed" in str(error)
    assert not broker.file.read_bytes()


@pytest.mark.parametrize("status", [307, 308])
async def test_a_redirect_is_followed_with_its_body(broker: Receiver, status: int) -> None:
    async with broker.to(f"/redirect/{status}//", redirects=1) as destination:
        await destination.dispatch(message := Message(1, topic="orders"))
    assert [one.id for one in await broker.received(1)] == [message.id]


async def test_a_redirect_that_makes_a_get_of_a_post_is_never_followed(broker: Receiver) -> None:
    assert isinstance(await failure(broker.to("/redirect/302//", redirects=5)), AnswerError)


async def test_redirects_come_to_an_end(broker: Receiver) -> None:
    turns = "/redirect/307/" * 3 + "/"
    assert isinstance(await failure(broker.to(turns, redirects=2)), AnswerError)


async def test_credentials_go_to_no_other_host_by_a_redirect(broker: Receiver, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    async for other in running(Receiver(tmp_path / "other")):
        away = Endpoint(f"{broker.url}/redirect/307/{other.url}/", headers={"Authorization": "Bearer mine"})
        here = Endpoint(f"{broker.url}/redirect/307//", headers={"Authorization": "Bearer mine"})
        for endpoint in (away, here):
            async with broker.by(endpoint, redirects=1) as destination:
                await destination.dispatch(Message(1, topic="orders"))
        await other.received(1)
        await broker.received(1)
        assert "authorization" not in other.requests[0]["headers"]
        assert broker.requests[0]["headers"]["authorization"] == "Bearer mine"


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "0.0.0.0"],  # noqa: S104 -- to be refused
)
async def test_a_private_address_is_refused_however_it_is_written(broker: Receiver, host: str) -> None:
    broker.url = broker.url.replace("localhost", host)
    assert isinstance(await failure(broker.to(allow_networks=())), AddressRefusedError)


async def test_a_private_address_is_refused_behind_a_redirect(broker: Receiver) -> None:
    where = f"/redirect/307/{broker.url.replace('localhost', '127.0.0.2')}/"
    assert isinstance(await failure(broker.to(where, redirects=1)), AddressRefusedError)


async def test_the_address_that_was_checked_is_the_one_that_is_connected_to(broker: Receiver) -> None:
    asked: list[str] = []

    async def rebinding(host: str, port: int) -> list[str]:
        asked.append(f"{host}:{port}")
        return ["127.0.0.2", "127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    backend = GuardedBackend(networks(HERE), resolve=rebinding)
    port = int(broker.url.rpartition(":")[2])
    stream = await backend.connect_tcp("rebinds.example", port)
    assert stream.get_extra_info("server_addr") == ("127.0.0.1", port)
    assert asked == [f"rebinds.example:{port}"]
    await stream.aclose()
    with pytest.raises(AddressRefusedError):
        await backend.connect_tcp("rebinds.example", port)


async def test_the_next_address_is_tried_where_one_does_not_answer(broker: Receiver) -> None:
    async def several(_host: str, _port: int) -> list[str]:
        return ["127.0.0.3", "127.0.0.1"]

    port = int(broker.url.rpartition(":")[2])
    stream = await GuardedBackend(networks(["127.0.0.0/8"]), resolve=several).connect_tcp("two.example", port)
    await stream.aclose()
    with pytest.raises(httpcore.ConnectError):
        await GuardedBackend(networks(["127.0.0.3"]), resolve=several).connect_tcp("two.example", port)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *(
            (one, True)
            for one in ("93.184.215.14", "2606:2800::1", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1")
        ),
        *((one, False) for one in ("10.0.0.1", "172.16.0.1", "192.168.1.1", "127.0.0.1", "169.254.169.254", "0.0.0.0")),  # noqa: S104
        *(
            (one, False)
            for one in ("100.64.0.1", "224.0.0.1", "239.1.1.1", "255.255.255.255", "240.0.0.1", "192.0.2.1")
        ),
        *(
            (one, False)
            for one in ("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1")
        ),
        *(
            (one, False)
            for one in ("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1", "::7f00:1")
        ),
        *((one, False) for one in ("2001::1", "2002:a9fe:a9fe::1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1")),
    ],
)
def test_only_addresses_of_the_public_internet_may_be_reached(address: str, public: bool) -> None:  # noqa: FBT001
    parsed: IPv4Address | IPv6Address = ip_address(address)
    assert may_reach(parsed) is public
    if not public and "%" not in address:
        assert may_reach(parsed, networks([address]))
        assert not may_reach(parsed, networks(["198.51.100.7"]))


# --- signatures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["binary", "structured"])
async def test_a_request_is_signed_with_each_secret(broker: Receiver, mode: str) -> None:
    async with broker.by(Endpoint(broker.url, secrets=[SECRET, OTHER]), mode=mode) as destination:
        await destination.dispatch(message := Message({"a": 1}, topic="orders"))
    await broker.received(1)
    headers, body = broker.requests[0]["headers"], broker.body(0)
    assert headers["webhook-id"] == str(message.id)
    for secret in (SECRET, OTHER):
        verify(body, headers, [secret])
    with pytest.raises(SignatureError, match="no signature"):
        verify(body + b" ", headers, [SECRET])
    with pytest.raises(ValueError, match="signature of another"):
        received({**headers, "webhook-id": "another"}, body)


PUBLISHED = {  # the vector in the specification's reference libraries
    "Webhook-Id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "Webhook-Timestamp": "1614265330",
    "Webhook-Signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
}
PAYLOAD = b'{"test": 2432232314}'
THEN = 1614265330


def test_the_published_signature_is_verified() -> None:
    verify(PAYLOAD, PUBLISHED, [OTHER, SECRET], now=THEN)
    others = "v1,Ceo5qEr07ixe2NLpvHk3FH9bwy/WavXrAFQ/9tdO6mc= v2,x "
    verify(PAYLOAD, {**PUBLISHED, "Webhook-Signature": others + PUBLISHED["Webhook-Signature"]}, [SECRET], now=THEN)


@pytest.mark.parametrize(
    ("changed", "now", "reason"),
    [
        ({}, THEN + 301, "longer than"),
        ({}, THEN - 301, "longer than"),
        ({"Webhook-Id": "msg_other"}, THEN, "no signature"),
        ({"Webhook-Timestamp": str(THEN + 1)}, THEN, "no signature"),
        ({"Webhook-Timestamp": "-1"}, THEN, "whole seconds"),
        ({"Webhook-Timestamp": "²"}, THEN, "whole seconds"),
        ({"Webhook-Signature": ""}, THEN, "no header"),
        ({"Webhook-Signature": "v1,Grüße"}, THEN, "no signature"),
        ({"Webhook-Signature": "g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="}, THEN, "no signature"),
    ],
)
def test_what_is_not_signed_now_and_by_us_is_refused(changed: dict[str, str], now: int, reason: str) -> None:
    with pytest.raises(SignatureError, match=reason):
        verify(PAYLOAD, {**PUBLISHED, **changed}, [SECRET], now=now)


@pytest.mark.parametrize(
    "secret", ["hunter2", "whsec_", "whsec_hunter2!", "whsec_" + "aHVu" * 7, "whsec_" + "aHVu" * 22]
)
def test_a_secret_that_is_none_is_refused_and_not_told(secret: str) -> None:
    with pytest.raises(ValueError, match="secret 2") as caught:
        Endpoint("https://example.com", secrets=[SECRET, secret])
    assert "hunter2" not in str(caught.value)
    assert "aHVu" not in str(caught.value)
    assert SECRET not in repr(Endpoint("https://example.com", secrets=[SECRET]))


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b"{}"),
        ({"ce-id": "not-a-uuid", "ce-type": "orders"}, b""),
        ({"ce-id": str(UUID(int=1)), "ce-type": "%C0%A0"}, b""),
        ({"ce-id": str(UUID(int=1)), "ce-type": "orders", "ce-outboxheaders": "[1]"}, b""),
        ({"content-type": "application/cloudevents+json"}, b"[]"),
        ({"content-type": "application/cloudevents+json"}, b"{"),
        ({"content-type": "application/cloudevents+json; charset=utf-8"}, b'{"id": 1, "type": 2}'),
    ],
)
def test_what_somebody_else_sent_is_a_value_error(headers: dict[str, str], body: bytes) -> None:
    with pytest.raises(ValueError, match="was not sent by asyncpg-outbox"):
        received(headers, body)


# --- helpers ----------------------------------------------------------------------------------------------


async def failure(destination: WebhookDispatcher) -> BaseException:
    """Dispatches one message and returns what it failed with."""
    async with destination:
        return (await failures_of(destination, Message(1, topic="orders"))).popitem()[1]


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Makes a certificate for localhost, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files
