"""Amazon SQS, emulated by the server of moto: see `aws.py`."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import SkipTest
from uuid import UUID, uuid4

import asyncpg
import pytest

from outbox import DestinationUnavailableError, Message, Outbox, OutboxError, RejectedError
from outbox.destinations.sqs import EntryError, SqsDispatcher, received
from outbox.testing import CONTRACT, Case
from tests.destinations.aws import (
    AwsBroker,
    Emulator,
    Way,
    emulator,
    new_queue,
    reading,
    run,
)
from tests.destinations.failures import failures_of
from tests.destinations.relaying import check_the_whole_way

MEBIBYTE = 1024 * 1024
# By the reference of SendMessageBatch, but for the carriage return, which XML makes a line feed of.
ALLOWED = re.compile("[\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]+")


class Sqs(AwsBroker):
    topic = "orders"
    too_large: int | None = MEBIBYTE + 1
    unroutable: str | None = "nobody"

    def destination(self) -> AbstractAsyncContextManager[SqsDispatcher]:
        return nullcontext(self.sending())

    def sending(self, **settings: Any) -> SqsDispatcher:
        return SqsDispatcher(self.client, self.where, **{"timeout": timedelta(seconds=2), **settings})

    def where(self, message: Message) -> str:
        return self.queue.replace("/queue-", "/nobody-") if message.topic == self.unroutable else self.queue


@pytest.fixture(scope="module")
def aws() -> Iterator[Emulator]:
    with emulator() as running:
        yield running


@asynccontextmanager
async def queue(aws: Emulator, kind: str) -> AsyncIterator[Sqs]:
    async with Way(aws.port) as way, aws.client("sqs") as reader, aws.client("sqs", way.port) as client:
        broker = Sqs(aws, way, client, await new_queue(reader, f"queue-{uuid4().hex}{kind}"))
        async with reading(broker, reader):
            yield broker


@pytest.fixture
async def fifo(aws: Emulator) -> AsyncIterator[Sqs]:
    async with queue(aws, ".fifo") as broker:
        yield broker


@pytest.fixture
async def standard(aws: Emulator) -> AsyncIterator[Sqs]:
    async with queue(aws, "") as broker:
        yield broker


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.__name__)
async def test_the_contract_with_a_fifo_queue(case: Case, fifo: Sqs) -> None:
    await run(case, fifo)


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.__name__)
async def test_the_contract_with_a_standard_queue(case: Case, standard: Sqs) -> None:
    if "in_its_order" in case.__name__:
        raise SkipTest("a standard queue keeps no order")
    await run(case, standard)


async def test_the_whole_way(standard: Sqs, pool: "asyncpg.Pool[Any]", outbox: Outbox) -> None:
    await check_the_whole_way(standard, pool, outbox, count=1_000)


async def test_a_message_and_its_attributes(fifo: Sqs) -> None:
    headers = {"traceparent": "00-1-2-01", "tracestate": "", "Tenant": "Grüße"}
    message = Message.from_body(
        b'{"a": 1}', topic="orders", key="a key", headers=headers, recorded_at=datetime(2024, 2, 29, tzinfo=UTC)
    )
    await fifo.sending().dispatch(message)
    await fifo.received(1)
    (raw,) = fifo.raws
    assert raw["Body"] == '{"a": 1}'
    assert {name: one["StringValue"] for name, one in raw["MessageAttributes"].items()} == {
        "outbox-id": str(message.id),
        "outbox-topic": "orders",
        "outbox-key": "a key",
        "outbox-recorded-at": "2024-02-29T00:00:00+00:00",
        "outbox-headers": '{"traceparent":"00-1-2-01","tracestate":"","Tenant":"Gr\\u00fc\\u00dfe"}',
        "traceparent": "00-1-2-01",
    }


@pytest.mark.parametrize("key", ["order-1", "a key", "Grüße", "k" * 129, "", None])
async def test_the_key_is_the_group_and_the_id_the_deduplication_id(fifo: Sqs, key: str | None) -> None:
    message, other = Message(1, topic="orders", key=key), Message(2, topic="orders", key=key)
    await fifo.sending().dispatch(message, other)
    assert {(one.id, one.key) for one in await fifo.received(2)} == {(message.id, key), (other.id, key)}
    attributes = [raw["Attributes"] for raw in fifo.raws]
    assert {one["MessageDeduplicationId"] for one in attributes} == {str(message.id), str(other.id)}
    groups = {one["MessageGroupId"] for one in attributes}
    assert len(groups) == (2 if key is None else 1)
    assert (groups == {key}) is (key == "order-1")


@pytest.mark.parametrize(
    "body", [b"", b"\r\n", b"\0", b"\xff", "\ufffe".encode(), b" ", "\U0001f44b".encode(), b"====", b"\t\n"]
)
async def test_a_body_arrives_whether_it_is_text_or_not(standard: Sqs, body: bytes) -> None:
    headers = {"outbox-id": "mine", "odd": "\uffff\x01"}
    await standard.sending().dispatch(Message.from_body(body, topic="orders", headers=headers))
    (arrived,) = await standard.received(1)
    assert (arrived.body, arrived.headers) == (body, headers)
    sent = [standard.raws[0]["Body"], *(one["StringValue"] for one in standard.raws[0]["MessageAttributes"].values())]
    assert all(ALLOWED.fullmatch(text) for text in sent)  # which the emulator does not ask for


# Beyond a mebibyte, which the JSON around the messages makes of it, aiohttp would rather have a file.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
async def test_a_request_has_ten_entries_and_a_mebibyte_at_most(standard: Sqs) -> None:
    sizes: list[int] = []

    class Client:
        async def send_message_batch(self, **request: Any) -> Any:
            sizes.append(len(request["Entries"]))
            return await standard.client.send_message_batch(**request)

    fitting = MEBIBYTE - 200  # and its attributes
    bodies = [*(b"x" for _ in range(12)), b"x" * fitting, b"y" * (MEBIBYTE // 2), b"z" * (MEBIBYTE // 3)]
    messages = [Message.from_body(body, topic="orders") for body in bodies]
    await SqsDispatcher(Client(), standard.queue, concurrency=1).dispatch(*messages)
    assert len(await standard.received(15)) == 15
    assert sizes == [10, 2, 1, 2]


async def test_what_is_too_large_with_its_attributes_is_not_sent(standard: Sqs) -> None:
    message = Message.from_body(b"x" * 900, topic="orders", headers={"long": "y" * 100})
    failures = await failures_of(standard.sending(max_size=1000), message)
    assert isinstance(failures[message.id], RejectedError)
    assert "beyond 1000" in str(failures[message.id])


async def test_a_function_that_knows_no_queue_fails_its_message_alone(standard: Sqs) -> None:
    queues = {"orders": standard.queue}
    good, bad = Message(1, topic="orders"), Message(1, topic="others")
    destination = SqsDispatcher(standard.client, lambda message: queues[message.topic])
    failures = await failures_of(destination, bad, good)
    assert list(failures) == [bad.id]
    assert isinstance(failures[bad.id], KeyError)
    assert [one.id for one in await standard.received(1)] == [good.id]


class Answering:
    """A client that fails as it is told, and takes the rest: the emulator refuses no entry of a request it takes."""

    def __init__(self, *failed: list[dict[str, Any]]) -> None:
        self.failed = list(failed)
        self.requests: list[list[str]] = []

    async def send_message_batch(self, **request: Any) -> dict[str, Any]:
        self.requests.append([entry["MessageBody"] for entry in request["Entries"]])
        failed = self.failed.pop(0)
        taken = {entry["Id"] for entry in request["Entries"]} - {one["Id"] for one in failed}
        return {"Successful": [{"Id": name} for name in taken], "Failed": failed}


@pytest.mark.parametrize(
    ("code", "is_ours", "kind"),
    [
        ("InvalidMessageContents", True, RejectedError),
        ("InvalidParameterValue", True, RejectedError),
        ("AccessDenied", True, EntryError),
        ("KmsDisabled", True, EntryError),
        ("KmsThrottled", True, DestinationUnavailableError),
        ("InternalError", False, DestinationUnavailableError),
    ],
)
async def test_an_entry_that_failed_is_sorted_and_the_others_are_accepted(
    code: str,
    is_ours: bool,  # noqa: FBT001 -- a parameter of the test
    kind: type[Exception],
) -> None:
    messages = [Message(number, topic="orders") for number in range(3)]
    client = Answering([{"Id": "1", "Code": code, "SenderFault": is_ours, "Message": "why"}])
    failures = await failures_of(SqsDispatcher(client, "https://sqs/queue"), *messages)
    assert list(failures) == [messages[1].id]
    assert type(failures[messages[1].id]) is kind
    assert code in str(failures[messages[1].id])


async def test_a_page_that_something_on_the_way_answers_is_no_acknowledgement(aws: Emulator) -> None:
    page = b"<html>sign in</html>"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]))
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % len(page) + page)
        await writer.drain()
        writer.close()

    message = Message(1, topic="orders")
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as portal:
        port = portal.sockets[0].getsockname()[1]
        async with aws.client("sqs", port) as client:
            failures = await failures_of(SqsDispatcher(client, f"http://127.0.0.1:{port}/1/queue"), message)
    assert isinstance(failures[message.id], DestinationUnavailableError)


async def test_those_behind_a_failure_of_their_group_are_not_sent() -> None:
    messages = [Message(number, topic="orders", key="ab"[number % 2]) for number in range(12)]
    client = Answering([{"Id": "0", "Code": "AccessDenied", "SenderFault": True}], [])
    failures = await failures_of(SqsDispatcher(client, "https://sqs/queue.fifo"), *messages)
    assert client.requests[1:] == [["11"]]  # of the second request 10 is behind 0
    assert list(failures) == [messages[0].id, messages[10].id]
    assert type(failures[messages[10].id]) is OutboxError
    assert failures[messages[10].id].__cause__ is failures[messages[0].id]


async def test_a_queue_that_takes_nothing_now_is_not_asked_for_each_request(standard: Sqs) -> None:
    messages = [Message(number, topic="orders") for number in range(100)]
    await standard.way.close()
    failures = await failures_of(standard.sending(concurrency=1), *messages)
    assert len(failures) == 100
    assert all(isinstance(error, DestinationUnavailableError) for error in failures.values())
    assert len([error for error in failures.values() if "not tried" in str(error)]) == 90
    await standard.way.open()


def test_a_message_of_a_lambda_function_is_received() -> None:
    message = UUID("01900000-0000-7000-8000-000000000000")
    attributes = {"outbox-id": str(message), "outbox-topic": "orders", "outbox-headers": '{"a":"b"}'}
    raw = {
        "messageId": "059f36b4",
        "body": "1",
        "messageAttributes": {
            name: {"stringValue": text, "stringListValues": [], "binaryListValues": [], "dataType": "String"}
            for name, text in attributes.items()
        },
    }
    arrived = received(raw)
    assert (arrived.id, arrived.topic, arrived.headers, arrived.payload) == (message, "orders", {"a": "b"}, 1)


def test_what_came_without_its_attributes_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="asking for 'All'"):
        received({"Body": "1"})
