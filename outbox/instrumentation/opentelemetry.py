"""Traces and metrics for OpenTelemetry; it needs the extra `opentelemetry`, which is the API alone.

Names, kinds and attributes are those of OpenTelemetry's semantic conventions for messaging. A message has a "create"
span where it is dispatched, whose context travels in its headers; a "send" span for each batch handed to the
destination is linked to those of its messages. Whoever takes a message from the broker goes on from its headers.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from outbox._dispatcher import Dispatcher
from outbox._errors import PartialDispatchError, describe, needs
from outbox._events import Event, MessageDied, MessageFailed
from outbox._message import Message
from outbox._outbox import Outbox
from outbox.instrumentation._metrics import DELIVERED, METRICS, Metric, Metrics

with needs("opentelemetry"):
    from opentelemetry import metrics, propagate, trace
    from opentelemetry.context import Context
    from opentelemetry.metrics import Counter, Histogram, Meter, MeterProvider, UpDownCounter
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind, StatusCode, TracerProvider
    from opentelemetry.util.types import Attributes

_SCOPE: Final = "outbox"
_SYSTEM: Final = "messaging.system"
_OPERATION: Final = "messaging.operation.name"
_OPERATION_TYPE: Final = "messaging.operation.type"
_DESTINATION: Final = "messaging.destination.name"
_MESSAGE_ID: Final = "messaging.message.id"
_COUNT: Final = "messaging.batch.message_count"
_ERROR_TYPE: Final = "error.type"


class TracingDecorator:
    """Gives each message a "create" span and puts its context into the headers, for `OutboxDispatcher(decorators=…)`.

    The span is a child of the current one. The headers are those of the global propagator: `traceparent` and
    `tracestate`, and `baggage` if there is any. A message that has a trace context in its headers keeps it, without a
    span. A transaction that rolls back leaves a "create" span to which no other is linked.

    Args:
        tracer_provider: The global one unless given.
    """

    def __init__(self, *, tracer_provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer(_SCOPE, tracer_provider=tracer_provider)

    def __call__(self, message: Message) -> Message:
        """Returns a copy with the context in its headers."""
        if _creation(message):
            return message
        attributes = {
            _SYSTEM: "outbox",
            _OPERATION: "create",
            _OPERATION_TYPE: "create",
            _DESTINATION: message.topic,
            _MESSAGE_ID: str(message.id),
        }
        span = self._tracer.start_span(f"create {message.topic}", kind=SpanKind.PRODUCER, attributes=attributes)
        message = _carrying(span, message)
        span.end()
        return message


class TracingDispatcher:
    """Hands each batch on inside of a "send" span, linked to the contexts in which its messages were created.

    It is the current span while the inner dispatcher works, so what a broker's client is instrumented with nests in
    it. A message that carries no context, or a broken one, gets that of this span. When some or all of a batch fail the
    span has the status of an error and an event for each failure.

    Args:
        inner: The destination.
        system: What the destination leads to, in the conventions' words: `kafka`, `rabbitmq`, `aws_sqs`.
        tracer_provider: The global one unless given.
    """

    def __init__(
        self, inner: Dispatcher, *, system: str = "outbox", tracer_provider: TracerProvider | None = None
    ) -> None:
        self._inner = inner
        self._system = system
        self._tracer = trace.get_tracer(_SCOPE, tracer_provider=tracer_provider)

    async def dispatch(self, *messages: Message) -> None:
        """Hands the messages on, in one call."""
        if not messages:
            return
        contexts = [_creation(message) for message in messages]
        topic = _common_topic(messages)
        with self._tracer.start_as_current_span(
            f"send {topic}" if topic else "send",
            kind=SpanKind.CLIENT if all(contexts) else SpanKind.PRODUCER,
            attributes=self._attributes(messages, topic),
            links=_links(messages, contexts, topic),
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            pairs = zip(messages, contexts, strict=True)
            outgoing = (
                messages if all(contexts) else [one if context else _carrying(span, one) for one, context in pairs]
            )
            try:
                await self._inner.dispatch(*outgoing)
            except BaseException as error:
                _record(span, error)
                raise

    def _attributes(self, messages: Sequence[Message], topic: str | None) -> Attributes:
        attributes: dict[str, str | int] = {
            _SYSTEM: self._system,
            _OPERATION: "send",
            _OPERATION_TYPE: "send",
            _COUNT: len(messages),
        }
        if topic:
            attributes[_DESTINATION] = topic
        if len(messages) == 1:
            attributes[_MESSAGE_ID] = str(messages[0].id)
        return attributes


def _common_topic(messages: Sequence[Message]) -> str | None:
    topic = messages[0].topic
    return topic if all(message.topic == topic for message in messages) else None


def _links(messages: Sequence[Message], contexts: Sequence[SpanContext | None], topic: str | None) -> list[Link]:
    links = []
    for message, context in zip(messages, contexts, strict=True):
        if context:
            attributes = {_MESSAGE_ID: str(message.id)}
            if topic is None:
                attributes[_DESTINATION] = message.topic
            links.append(Link(context, attributes))
    return links


def _creation(message: Message) -> SpanContext | None:
    """Returns the context in which a message was created, if it carries one that can be read."""
    if not message.headers:
        return None
    try:
        extracted = propagate.extract(message.headers, Context())
    except Exception:  # noqa: BLE001 -- a propagator of somebody's own; no header may cost a delivery
        return None
    context = trace.get_current_span(extracted).get_span_context()
    return context if context.is_valid else None


def _carrying(span: Span, message: Message) -> Message:
    """Returns the message with the context of a span in its headers; without an SDK there may be none."""
    headers: dict[str, str] = {}
    try:
        propagate.inject(headers, trace.set_span_in_context(span))
        return message.with_headers(headers) if headers else message
    except Exception:  # noqa: BLE001 -- as above; nor may one cost a dispatch, and the writer's transaction with it
        return message


def _record(span: Span, error: BaseException) -> None:
    if not span.is_recording():
        return
    if not isinstance(error, PartialDispatchError):
        span.record_exception(error)
        kinds = {type(error).__qualname__}
    else:
        # Without their tracebacks: there may be as many as messages.
        for name, failure in error.failures.items():
            kind, text = type(failure).__qualname__, describe(failure)
            attributes = {"exception.type": kind, "exception.message": text, _MESSAGE_ID: str(name)}
            span.add_event("exception", attributes)
        kinds = {type(failure).__qualname__ for failure in error.failures.values()}
    if kinds:
        span.set_attribute(_ERROR_TYPE, kinds.pop() if len(kinds) == 1 else type(error).__qualname__)
        span.set_status(StatusCode.ERROR, describe(error))


class OpenTelemetryMetrics(Metrics):
    """A hook that counts and times what one relay does, and a task that counts what is in the tables.

    Make one for each relay and give it as one of the relay's `hooks`. Relays of one process add up, also those of one
    outbox. Everything has the attribute `outbox.table`, the table with its schema.

    Args:
        outbox: That of the relay.
        system: What the destination leads to, as for `TracingDispatcher`.
        meter_provider: The global one unless given.
        topics: Whether messages delivered, failed and died are counted by topic, `messaging.destination.name`. Each
            topic is a time series more, so only where there are few.
    """

    def __init__(
        self,
        outbox: Outbox,
        *,
        system: str = "outbox",
        meter_provider: MeterProvider | None = None,
        topics: bool = False,
    ) -> None:
        super().__init__(outbox, topics=topics)
        meter = metrics.get_meter(_SCOPE, meter_provider=meter_provider)
        self._instruments = {metric: _instrument(meter, metric) for metric in METRICS}
        own = {"outbox.table": self._table}
        sending = {**own, _SYSTEM: system, _OPERATION: "send", _OPERATION_TYPE: "send"}
        self._attributes = {
            metric: sending if metric.opentelemetry.startswith("messaging.") else own for metric in METRICS
        }
        self._appear()

    def __call__(self, event: Event) -> None:
        """Measures what the event tells."""
        if isinstance(event, MessageFailed | MessageDied):  # which the conventions count as sent, with an error
            error = {_ERROR_TYPE: type(event.error).__qualname__}
            self._add_with(DELIVERED, 1, self._topic(event.message), error)
        super().__call__(event)

    def _add(self, metric: Metric, amount: int, topic: str = "") -> None:
        self._add_with(metric, amount, topic, {})

    def _add_with(self, metric: Metric, amount: int, topic: str, more: dict[str, str]) -> None:
        instrument = self._instruments[metric]
        assert isinstance(instrument, Counter | UpDownCounter)
        attributes = self._attributes[metric]
        if topic:
            more = {**more, _DESTINATION: topic}
        instrument.add(amount, {**attributes, **more} if more else attributes)

    def _observe(self, metric: Metric, values: Iterable[float]) -> None:
        instrument, attributes = self._instruments[metric], self._attributes[metric]
        assert isinstance(instrument, Histogram)
        for value in values:
            instrument.record(value, attributes)

    def _set(self, metric: Metric, value: float) -> None:
        instrument = self._instruments[metric]
        assert isinstance(instrument, metrics._Gauge)
        instrument.set(value, self._attributes[metric])


def _instrument(meter: Meter, metric: Metric) -> Counter | UpDownCounter | Histogram | metrics._Gauge:
    name, unit, text = metric.opentelemetry, metric.unit, metric.text
    match metric.kind:
        case "counter":
            return meter.create_counter(name, unit, text)
        case "part":
            return meter.create_up_down_counter(name, unit, text)
        case "histogram":
            return meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=metric.bounds)
        case "state":
            return meter.create_gauge(name, unit, text)
