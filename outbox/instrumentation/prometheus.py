"""Metrics for Prometheus; it needs the extra `prometheus`."""

from collections.abc import Iterable
from typing import Final
from weakref import WeakKeyDictionary

from outbox._errors import needs
from outbox._outbox import Outbox
from outbox.instrumentation._metrics import METRICS, Metric, Metrics

with needs("prometheus"):
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_Instrument = Counter | Gauge | Histogram

# A registry takes each name once and does not tell what it has, so this remembers it: several relays share them.
_registered: Final[WeakKeyDictionary[CollectorRegistry, dict[Metric, _Instrument]]] = WeakKeyDictionary()


class PrometheusMetrics(Metrics):
    """A hook that counts and times what one relay does, and a task that counts what is in the tables.

    Make one for each relay and give it as one of the relay's `hooks`. Relays of one process add up, also those of one
    outbox. Each metric has the label `outbox`, the table with its schema; what is counted by topic also has `topic`.

    Args:
        outbox: That of the relay.
        registry: Where the metrics are registered, all of them at once. Any number of relays may share it.
        topics: Whether messages delivered, failed and died are counted by topic. Each topic is a time series more, so
            only where there are few; without it the label is empty, which to Prometheus is the same as none.
    """

    def __init__(self, outbox: Outbox, *, registry: CollectorRegistry = REGISTRY, topics: bool = False) -> None:
        super().__init__(outbox, topics=topics)
        if registry not in _registered:
            _registered[registry] = {metric: _instrument(metric, registry) for metric in METRICS}
        self._instruments = _registered[registry]
        self._children: dict[tuple[Metric, str], _Instrument] = {}
        self._appear()

    def _add(self, metric: Metric, amount: int, topic: str = "") -> None:
        child = self._child(metric, topic)
        assert isinstance(child, Counter | Gauge)
        child.inc(amount)

    def _observe(self, metric: Metric, values: Iterable[float]) -> None:
        child = self._child(metric)
        assert isinstance(child, Histogram)
        for value in values:
            child.observe(value)

    def _set(self, metric: Metric, value: float) -> None:
        child = self._child(metric)
        assert isinstance(child, Gauge)
        child.set(value)

    def _child(self, metric: Metric, topic: str = "") -> _Instrument:
        child = self._children.get((metric, topic))
        if child is None:
            labels = (self._table, topic) if metric.by_topic else (self._table,)
            child = self._children[metric, topic] = self._instruments[metric].labels(*labels)
        return child


def _instrument(metric: Metric, registry: CollectorRegistry) -> _Instrument:
    name, text, labels = metric.prometheus, metric.text, ("outbox", "topic") if metric.by_topic else ("outbox",)
    match metric.kind:
        case "counter":
            return Counter(name, text, labels, registry=registry)
        case "histogram":
            return Histogram(name, text, labels, buckets=metric.bounds, registry=registry)
        case "part":
            return Gauge(name, text, labels, registry=registry, multiprocess_mode="livesum")
        case "state":
            return Gauge(name, text, labels, registry=registry, multiprocess_mode="livemostrecent")
