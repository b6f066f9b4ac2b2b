"""Traces and metrics, with OpenTelemetry's own SDK, through a real outbox."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from opentelemetry import baggage, context, propagate, trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv._incubating.attributes import messaging_attributes as messaging
from opentelemetry.semconv._incubating.metrics import messaging_metrics
from opentelemetry.semconv.attributes import error_attributes, exception_attributes
from opentelemetry.trace import SpanContext, SpanKind, StatusCode

from outbox import (
    DestinationDown,
    DestinationUnavailableError,
    DestinationUp,
    Dispatcher,
    Message,
    MessageDied,
    NoWaiting,
    Outbox,
    OutboxDispatcher,
    PartialDispatchError,
    RejectedError,
    Relay,
)
from outbox.instrumentation._metrics import METRICS
from outbox.instrumentation.opentelemetry import OpenTelemetryMetrics, TracingDecorator, TracingDispatcher
from tests.test_relay import Destination, Events, running, write

BROKEN = [
    "",
    "nonsense",
    "00-00000000000000000000000000000000-0000000000000000-01",
    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
    "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "00-4BF92F3577B34DA6A3CE929D0E0E4736-00F067AA0BA902B7-01",
    "ü" * 600,
]
GIVEN = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

SetPropagator = Callable[[TextMapPropagator], None]


class Traces:
    """The spans of one test, kept."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("test")
        self.decorator = TracingDecorator(tracer_provider=self.provider)

    def around(self, destination: Dispatcher, **settings: Any) -> TracingDispatcher:
        return TracingDispatcher(destination, tracer_provider=self.provider, **settings)

    def starting(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name.startswith(name)]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.starting(name)
        return span


@pytest.fixture
def traces() -> Iterator[Traces]:
    traces = Traces()
    yield traces
    traces.provider.shutdown()


@pytest.fixture
def propagator() -> Iterator[SetPropagator]:
    """Sets the global propagator for one test."""
    before = propagate.get_global_textmap()
    yield propagate.set_global_textmap
    propagate.set_global_textmap(before)


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def context_of(span: ReadableSpan) -> SpanContext:
    found = span.get_span_context()
    assert found
    return found


def carried(message: Message) -> SpanContext:
    """Returns the context that a consumer finds in the headers."""
    return trace.get_current_span(propagate.extract(message.headers, Context())).get_span_context()


def same(one: SpanContext, other: SpanContext) -> bool:
    return (one.trace_id, one.span_id) == (other.trace_id, other.span_id)


async def dispatch(pool: asyncpg.Pool[Any], outbox: Outbox, traces: Traces, *messages: Message) -> None:
    async with pool.acquire() as connection, connection.transaction():
        await OutboxDispatcher(connection, outbox, decorators=[traces.decorator]).dispatch(*messages)


# --- traces -------------------------------------------------------------------------------------------------


async def test_a_trace_goes_from_the_request_through_the_table_and_the_relay_to_the_consumer(
    pool: asyncpg.Pool[Any], outbox: Outbox, traces: Traces
) -> None:
    arrived: list[Message] = []
    message = Message({"order": 1}, topic="orders")

    class Broker:
        async def dispatch(self, *messages: Message) -> None:
            arrived.extend(messages)
            with traces.tracer.start_as_current_span("the client's own"):
                pass

    with traces.tracer.start_as_current_span("request"):
        await dispatch(pool, outbox, traces, message)
    assert await Relay(outbox, pool, traces.around(Broker(), system="kafka")).run_once() == 1

    request, create, send = traces.one("request"), traces.one("create"), traces.one("send")
    assert create.parent is not None
    assert same(create.parent, context_of(request))
    assert (create.name, create.kind) == ("create orders", SpanKind.PRODUCER)
    assert attributes_of(create) == {
        messaging.MESSAGING_SYSTEM: "outbox",
        messaging.MESSAGING_OPERATION_NAME: "create",
        messaging.MESSAGING_OPERATION_TYPE: messaging.MessagingOperationTypeValues.CREATE.value,
        messaging.MESSAGING_DESTINATION_NAME: "orders",
        messaging.MESSAGING_MESSAGE_ID: str(message.id),
    }
    assert (send.name, send.kind, send.status.status_code) == ("send orders", SpanKind.CLIENT, StatusCode.UNSET)
    assert send.parent is None
    assert attributes_of(send) == {
        messaging.MESSAGING_SYSTEM: messaging.MessagingSystemValues.KAFKA.value,
        messaging.MESSAGING_OPERATION_NAME: "send",
        messaging.MESSAGING_OPERATION_TYPE: messaging.MessagingOperationTypeValues.SEND.value,
        messaging.MESSAGING_DESTINATION_NAME: "orders",
        messaging.MESSAGING_BATCH_MESSAGE_COUNT: 1,
        messaging.MESSAGING_MESSAGE_ID: str(message.id),
    }
    (link,) = send.links
    assert same(link.context, context_of(create))
    own = traces.one("the client's own").parent
    assert own is not None
    assert same(own, context_of(send))
    assert same(carried(arrived[0]), context_of(create))


async def test_a_batch_is_linked_to_each_of_its_messages_and_says_what_they_share(
    pool: asyncpg.Pool[Any], outbox: Outbox, traces: Traces
) -> None:
    messages = [Message(number, topic=topic) for number, topic in enumerate(["a", "b", "a"])]
    await dispatch(pool, outbox, traces, *messages)
    await Relay(outbox, pool, traces.around(Destination())).run_once()
    send = traces.one("send")
    assert send.name == "send"
    assert messaging.MESSAGING_DESTINATION_NAME not in attributes_of(send)
    assert messaging.MESSAGING_MESSAGE_ID not in attributes_of(send)
    assert attributes_of(send)[messaging.MESSAGING_BATCH_MESSAGE_COUNT] == 3
    assert [dict(link.attributes or {}) for link in send.links] == [
        {messaging.MESSAGING_MESSAGE_ID: str(one.id), messaging.MESSAGING_DESTINATION_NAME: one.topic}
        for one in messages
    ]
    assert [link.context.span_id for link in send.links] == [
        context_of(span).span_id for span in traces.starting("create")
    ]


async def test_a_context_that_the_user_gave_a_message_stays(
    pool: asyncpg.Pool[Any], outbox: Outbox, traces: Traces
) -> None:
    destination = Destination()
    await dispatch(pool, outbox, traces, Message(1, topic="t", headers={"traceparent": GIVEN}))
    await Relay(outbox, pool, traces.around(destination)).run_once()
    assert not traces.starting("create")
    assert destination.calls[0][0].headers["traceparent"] == GIVEN
    assert traces.one("send").links[0].context.span_id == 0x00F067AA0BA902B7


@pytest.mark.parametrize("header", [None, *BROKEN])
async def test_without_a_context_that_can_be_read_a_message_is_delivered_with_that_of_its_batch(
    header: str | None, pool: asyncpg.Pool[Any], outbox: Outbox, traces: Traces
) -> None:
    destination = Destination()
    await write(pool, outbox, 1, headers={} if header is None else {"traceparent": header, "other": "kept"})
    assert await Relay(outbox, pool, traces.around(destination)).run_once() == 1
    send, (arrived,) = traces.one("send"), destination.calls[0]
    assert (send.kind, send.links) == (SpanKind.PRODUCER, ())
    assert same(carried(arrived), context_of(send))
    assert (header is None) != (arrived.headers.get("other") == "kept")


async def test_a_message_with_a_broken_context_gets_a_new_one_when_it_is_dispatched(traces: Traces) -> None:
    decorated = traces.decorator(Message(1, topic="t", headers={"traceparent": "nonsense"}))
    assert same(carried(decorated), context_of(traces.one("create")))


async def test_a_propagator_that_raises_costs_no_delivery(
    pool: asyncpg.Pool[Any], outbox: Outbox, traces: Traces, propagator: SetPropagator
) -> None:
    class Raising(TextMapPropagator):
        def extract(self, *_: Any, **__: Any) -> Context:
            raise ValueError("cannot be parsed")

        def inject(self, carrier: Any, *_: Any, **__: Any) -> None:
            carrier["x-own"] = "1"

        @property
        def fields(self) -> set[str]:
            return {"x-own"}

    propagator(Raising())
    destination = Destination()
    await write(pool, outbox, 1, headers={"x-own": "0"})
    assert await Relay(outbox, pool, traces.around(destination)).run_once() == 1
    assert destination.calls[0][0].headers["x-own"] == "1"


async def test_a_propagator_that_cannot_inject_costs_neither_a_dispatch_nor_a_delivery(
    pool: asyncpg.Pool[Any], outbox: Outbox, traces: Traces, propagator: SetPropagator
) -> None:
    class Raising(TextMapPropagator):
        def extract(self, *_: Any, **__: Any) -> Context:
            return Context()

        def inject(self, *_: Any, **__: Any) -> None:
            raise ValueError("cannot be written")

        @property
        def fields(self) -> set[str]:
            return set()

    propagator(Raising())
    decorators = [TracingDecorator(tracer_provider=traces.provider)]
    async with pool.acquire() as connection, connection.transaction():
        await OutboxDispatcher(connection, outbox, decorators=decorators).dispatch(Message(1, topic="orders"))
    destination = Destination()
    assert await Relay(outbox, pool, traces.around(destination)).run_once() == 1
    assert destination.calls[0][0].payload == 1


async def test_baggage_travels_as_well_and_an_unsampled_trace_stays_one(traces: Traces) -> None:
    token = context.attach(baggage.set_baggage("tenant", "7"))
    try:
        unsampled = TracingDecorator(tracer_provider=TracerProvider(sampler=ALWAYS_OFF))
        decorated = unsampled(Message(1, topic="t"))
    finally:
        context.detach(token)
    assert decorated.headers["baggage"] == "tenant=7"
    assert carried(decorated).is_valid
    assert not carried(decorated).trace_flags.sampled
    await traces.around(Destination()).dispatch(decorated)
    assert same(traces.one("send").links[0].context, carried(decorated))


async def test_without_an_sdk_messages_pass_unchanged() -> None:
    message, destination = Message(1, topic="t"), Destination()
    assert TracingDecorator()(message) is message
    await TracingDispatcher(destination).dispatch(message)
    await TracingDispatcher(destination).dispatch()
    assert destination.calls == [(message,)]


# --- traces of failures ---------------------------------------------------------------------------------------


async def test_the_failures_of_a_part_are_events_of_the_span(
    pool: asyncpg.Pool[Any], outbox: Outbox, traces: Traces
) -> None:
    messages = [Message(number, topic="t") for number in range(3)]
    failures: dict[Any, BaseException] = {messages[0].id: OSError("full"), messages[2].id: OSError("full")}

    def fault(_: object) -> None:
        raise PartialDispatchError(failures)

    await dispatch(pool, outbox, traces, *messages)
    assert await Relay(outbox, pool, traces.around(Destination(fault))).run_once() == 1
    send = traces.one("send")
    assert send.status.status_code is StatusCode.ERROR
    assert "2 of the batch failed" in (send.status.description or "")
    assert attributes_of(send)[error_attributes.ERROR_TYPE] == "OSError"
    assert [dict(event.attributes or {}) for event in send.events] == [
        {
            exception_attributes.EXCEPTION_TYPE: "OSError",
            exception_attributes.EXCEPTION_MESSAGE: "OSError: full",
            messaging.MESSAGING_MESSAGE_ID: str(message.id),
        }
        for message in (messages[0], messages[2])
    ]


async def test_failures_of_several_kinds_are_told_as_what_they_came_in(traces: Traces) -> None:
    messages = [Message(number, topic="t") for number in range(2)]
    failures: dict[Any, BaseException] = {messages[0].id: OSError(), messages[1].id: RejectedError()}

    def fault(_: object) -> None:
        raise PartialDispatchError(failures)

    with pytest.raises(PartialDispatchError):
        await traces.around(Destination(fault)).dispatch(*messages)
    assert attributes_of(traces.one("send"))[error_attributes.ERROR_TYPE] == "PartialDispatchError"


async def test_an_error_of_the_whole_batch_is_recorded_and_goes_on_to_the_relay(
    pool: asyncpg.Pool[Any], outbox: Outbox, traces: Traces
) -> None:
    def fault(_: object) -> None:
        raise DestinationUnavailableError("nobody listens")

    await dispatch(pool, outbox, traces, Message(1, topic="t"))
    events, destination = Events(), traces.around(Destination(fault))
    async with running(outbox, pool, destination, hooks=[events], destination_backoff=NoWaiting()):
        async with asyncio.timeout(10):
            await events.next(DestinationDown)
    send = traces.starting("send")[0]
    assert send.status.description == "DestinationUnavailableError: nobody listens"
    assert attributes_of(send)[error_attributes.ERROR_TYPE] == "DestinationUnavailableError"
    assert [event.name for event in send.events] == ["exception"]


async def test_a_delivery_that_takes_too_long_ends_its_span_with_an_error(
    pool: asyncpg.Pool[Any], outbox: Outbox, traces: Traces
) -> None:
    class Hanging:
        async def dispatch(self, *_: Message) -> None:
            await asyncio.Event().wait()

    await dispatch(pool, outbox, traces, Message(1, topic="t"))
    limit = timedelta(milliseconds=20)
    assert await Relay(outbox, pool, traces.around(Hanging()), dispatch_timeout=limit).run_once() == 0
    assert attributes_of(traces.one("send"))[error_attributes.ERROR_TYPE] == "CancelledError"


# --- metrics ------------------------------------------------------------------------------------------------


class Readings:
    """What one meter provider has measured."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader])

    def points(self, name: str) -> list[Any]:
        data = self._reader.get_metrics_data()
        assert data
        return [
            point
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def value(self, metric: str, **attributes: str) -> float | None:
        """Returns the one value of a name, with these attributes among its own; `_` stands for a dot."""
        wanted = {name.replace("_", "."): value for name, value in attributes.items()}
        found = [point for point in self.points(metric) if wanted.items() <= dict(point.attributes).items()]
        assert all(isinstance(point, NumberDataPoint) for point in found)
        return found[0].value if found else None


@pytest.fixture
def readings() -> Iterator[Readings]:
    readings = Readings()
    yield readings
    readings.provider.shutdown()


async def test_metrics_follow_a_relay_through_success_failure_and_death(
    pool: asyncpg.Pool[Any], outbox: Outbox, readings: Readings
) -> None:
    metrics = OpenTelemetryMetrics(outbox, system="nats", meter_provider=readings.provider, topics=True)
    old = datetime.now(UTC) - timedelta(hours=2)
    await write(pool, outbox, *range(4), recorded_at=old)
    faults: list[BaseException] = [DestinationUnavailableError("away")]

    def fault(messages: Any) -> None:
        if faults:
            raise faults.pop()
        if bad := {one.id: ValueError() for one in messages if one.payload == 3}:
            raise PartialDispatchError(bad)

    events = Events()
    hooks = [metrics, events]
    async with running(outbox, pool, Destination(fault), hooks=hooks, destination_backoff=NoWaiting()):
        async with asyncio.timeout(10):
            await events.next(MessageDied)
        assert readings.value("outbox.relays") == 1
        table = f"{outbox.schema}.outbox"
        assert readings.value("outbox.messages.died", outbox_table=table) == 0
        died = {"outbox.table": table, messaging.MESSAGING_DESTINATION_NAME: "t"}
        assert {1} == {point.value for point in readings.points("outbox.messages.died") if point.attributes == died}
    sent = {
        (point.attributes.get(messaging.MESSAGING_DESTINATION_NAME), point.attributes.get("error.type")): point.value
        for point in readings.points(messaging_metrics.MESSAGING_CLIENT_SENT_MESSAGES)
    }
    assert sent == {(None, None): 0, ("t", None): 3, ("t", "ValueError"): 3}
    (duration,) = readings.points(messaging_metrics.MESSAGING_CLIENT_OPERATION_DURATION)
    assert duration.attributes[messaging.MESSAGING_SYSTEM] == "nats"
    assert duration.attributes[messaging.MESSAGING_OPERATION_NAME] == "send"
    assert duration.explicit_bounds[0] == 0.005
    (lag,) = readings.points("outbox.lag")
    assert isinstance(lag, HistogramDataPoint)
    assert (lag.count, lag.min >= 7200) == (3, True)
    assert readings.value("outbox.relays") == 0
    assert readings.value("outbox.destination.down") == 0


async def test_what_is_in_the_tables_is_counted(pool: asyncpg.Pool[Any], outbox: Outbox, readings: Readings) -> None:
    metrics = OpenTelemetryMetrics(outbox, meter_provider=readings.provider)
    await write(pool, outbox, *range(3), recorded_at=datetime.now(UTC) - timedelta(hours=2))
    assert readings.value("outbox.messages.pending") is None
    async with asyncio.TaskGroup() as tasks:
        counting = tasks.create_task(metrics.run(pool, interval=timedelta(milliseconds=5)))
        async with asyncio.timeout(10):
            while readings.value("outbox.counted") is None:
                await pool.fetchval("SELECT 1")
        counting.cancel()
    assert readings.value("outbox.messages.pending") == 3
    assert readings.value("outbox.messages.waiting") == 0
    assert readings.value("outbox.dead_letters") == 0
    assert (readings.value("outbox.messages.oldest") or 0) >= 7200


def test_every_metric_has_an_instrument_and_a_name_of_its_own(outbox: Outbox, readings: Readings) -> None:
    OpenTelemetryMetrics(outbox, meter_provider=readings.provider)
    OpenTelemetryMetrics(outbox, meter_provider=readings.provider)
    assert len({metric.opentelemetry for metric in METRICS}) == len(METRICS)
    assert all(metric.opentelemetry.startswith(("outbox.", "messaging.client.")) for metric in METRICS)


async def test_the_breaker_of_each_relay_counts(outbox: Outbox, readings: Readings) -> None:
    one, other = (OpenTelemetryMetrics(outbox, meter_provider=readings.provider) for _ in range(2))
    for hook in (one, other, one):
        hook(DestinationDown(OSError(), timedelta()))
    assert readings.value("outbox.destination.down") == 2
    one(DestinationUp())
    assert readings.value("outbox.destination.down") == 1
