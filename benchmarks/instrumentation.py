"""Measures what being watched costs: `python benchmarks/instrumentation.py`.

A backlog is drained by one relay to a destination that does nothing, without anything and with each kind of
instrumentation in turn (A B C A B C), and messages are decorated. What counts is this process's CPU time a message, not
the clock's, since the machine may be shared: the ratio is that of the medians to the drain without anything.
"""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import argparse
import asyncio
from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

import asyncpg
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

from benchmarks.bench import Counting
from outbox import Dispatcher, Message, Outbox, Relay, embedded
from outbox.instrumentation.opentelemetry import OpenTelemetryMetrics, TracingDecorator, TracingDispatcher
from outbox.instrumentation.prometheus import PrometheusMetrics

_FILL = """
    INSERT INTO outbox (id, topic, key, headers, payload)
    SELECT gen_random_uuid(), 'orders', (n % 1000)::text,
        '{"traceparent":"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}', $2
    FROM generate_series(1, $1) AS n"""
_BODY = b'{"text":"' + b"x" * 290 + b'"}'

Settings = tuple[Dispatcher, list[Any]]
"""A destination and hooks."""


def variants(outbox: Outbox, destination: Counting) -> dict[str, Callable[[], Settings]]:
    """Returns by name what makes the settings of a relay."""
    recording, unsampled = TracerProvider(), TracerProvider(sampler=ALWAYS_OFF)
    meters, registry = MeterProvider([InMemoryMetricReader()]), CollectorRegistry()
    return {
        "nothing": lambda: (destination, []),
        "a hook that does nothing": lambda: (destination, [lambda _: None]),
        "Prometheus": lambda: (destination, [PrometheusMetrics(outbox, registry=registry)]),
        "Prometheus, by topic": lambda: (destination, [PrometheusMetrics(outbox, registry=registry, topics=True)]),
        "OpenTelemetry metrics": lambda: (destination, [OpenTelemetryMetrics(outbox, meter_provider=meters)]),
        "traces, no SDK": lambda: (TracingDispatcher(destination), []),
        "traces, not sampled": lambda: (TracingDispatcher(destination, tracer_provider=unsampled), []),
        "traces, sampled": lambda: (TracingDispatcher(destination, tracer_provider=recording), []),
    }


async def drain(pool: asyncpg.Pool[Any], outbox: Outbox, count: int, counting: Counting, settings: Settings) -> float:
    """Returns the microseconds of CPU time for a message, from a backlog of so many to none."""
    destination, hooks = settings
    await pool.execute(_FILL, count, _BODY)
    counting.count, started = 0, process_time()
    relay = Relay(outbox, pool, destination, hooks=hooks)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(relay.run())
        await counting.reaches(count)
        await relay.stop()
    return (process_time() - started) / count * 1e6


def decorate(decorator: Callable[[Message], Message], count: int) -> float:
    """Returns the microseconds of CPU time for a message."""
    messages = [Message(1, topic="orders") for _ in range(count)]
    started = process_time()
    for message in messages:
        decorator(message)
    return (process_time() - started) / count * 1e6


async def main(*, rounds: int, messages: int) -> None:
    """Runs everything on a server of its own; the first round only warms up."""
    outbox, counting = Outbox(), Counting()
    async with embedded.postgres(shared_buffers="256MB") as dsn, asyncpg.create_pool(dsn, min_size=4) as pool:
        async with pool.acquire() as connection:
            await outbox.migrate(connection)
        made = variants(outbox, counting)
        figures: dict[str, list[float]] = {name: [] for name in made}
        for number in range(rounds + 1):
            for name, make in made.items():
                figure = await drain(pool, outbox, messages, counting, make())
                if number:
                    figures[name].append(figure)
    table = Table("a drain with", "µs a message", "more", "ratio", title="CPU time of the relay's process, medians")
    floor = median(figures["nothing"])
    for name, values in figures.items():
        figure = median(values)
        table.add_row(name, f"{figure:.2f}", f"{figure - floor:+.2f}", f"{floor / figure:.2f}")
    console = Console()
    console.print(table)
    decorators = {
        "no SDK": TracingDecorator(),
        "not sampled": TracingDecorator(tracer_provider=TracerProvider(sampler=ALWAYS_OFF)),
        "sampled": TracingDecorator(tracer_provider=TracerProvider()),
    }
    for name, decorator in decorators.items():
        cost = median(decorate(decorator, 5_000) for _ in range(rounds))
        console.print(f"TracingDecorator, {name}: {cost:.1f} µs a message")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--messages", type=int, default=50_000, help="in a backlog")
    arguments = parser.parse_args()
    asyncio.run(main(rounds=arguments.rounds, messages=arguments.messages))
