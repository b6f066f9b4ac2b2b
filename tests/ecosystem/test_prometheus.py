"""Metrics as Prometheus reads them: the text of a registry, from real relays."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from outbox import (
    DatabaseLost,
    DestinationDown,
    DestinationUnavailableError,
    DestinationUp,
    FailImmediately,
    Message,
    MessageDied,
    MessageFailed,
    NoWaiting,
    Outbox,
    Relay,
    RelayAtWork,
    RelayFenced,
    RelaysDied,
    RelayStandsBy,
    RelayStarted,
    RelayStopped,
    SlotsOwned,
    WriterLate,
)
from outbox.instrumentation._metrics import METRICS
from outbox.instrumentation.prometheus import PrometheusMetrics
from tests.conftest import StartServer
from tests.test_relay import Destination, Events, fails, refuses, running, write

DOCS = Path(__file__).parents[2] / "docs"


async def until(condition: Callable[[], bool]) -> None:
    """Waits in small steps, since a record in a log or a registry wakes nobody."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 -- as above
            await asyncio.sleep(0.001)


class Scrape:
    """What a registry tells when it is scraped."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    @property
    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def __call__(self, name: str, **labels: str) -> float | None:
        """Returns the one sample of a name, with these labels among its own."""
        found = [
            sample.value
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert len(found) <= 1, f"{name} {labels} is ambiguous"
        return found[0] if found else None

    async def until(self, name: str, value: float) -> None:
        await until(lambda: self(name) == value)


@pytest.fixture
def scrape() -> Scrape:
    return Scrape()


# --- from events --------------------------------------------------------------------------------------------


async def test_what_is_delivered_is_counted_and_timed(pool: asyncpg.Pool[Any], outbox: Outbox, scrape: Scrape) -> None:
    metrics = PrometheusMetrics(outbox, registry=scrape.registry)
    await write(pool, outbox, *range(30), recorded_at=datetime.now(UTC) - timedelta(minutes=2))
    await write(pool, outbox, *range(10), recorded_at=datetime.now(UTC) + timedelta(minutes=2))
    destination = Destination()
    async with running(outbox, pool, destination, hooks=[metrics], batch_size=20):
        await destination.has_accepted(40)
        await scrape.until("outbox_delivered_total", 40)
    table = f"{outbox.schema}.outbox"
    assert scrape("outbox_delivered_total", outbox=table) == 40
    assert scrape("outbox_batch_seconds_count") == scrape("outbox_batch_messages_count") == 2
    assert scrape("outbox_batch_messages_sum") == 40
    assert scrape("outbox_lag_seconds_count") == 40
    assert scrape("outbox_lag_seconds_bucket", le="60.0") == 10  # of the future, and so of now
    assert scrape("outbox_lag_seconds_bucket", le="300.0") == 40
    assert (scrape("outbox_lag_seconds_sum") or 0) >= 30 * 120
    assert scrape("outbox_failed_total") == scrape("outbox_died_total") == 0


async def test_the_breaker_is_seen_going_down_and_up(pool: asyncpg.Pool[Any], outbox: Outbox, scrape: Scrape) -> None:
    metrics = PrometheusMetrics(outbox, registry=scrape.registry)
    down = [True]

    def fault(_: object) -> None:
        if down:
            raise DestinationUnavailableError("away")

    events, destination = Events(), Destination(fault)
    assert scrape("outbox_destination_down") == 0
    settings: dict[str, Any] = {"hooks": [metrics, events], "destination_backoff": NoWaiting()}
    async with running(outbox, pool, destination, **settings), asyncio.timeout(10):
        await write(pool, outbox, 1)
        await destination.until(lambda it: len(it.calls) > 3)
        assert scrape("outbox_destination_down") == 1
        assert scrape("outbox_failed_total") == 0
        down.clear()
        await events.next(DestinationUp)
        assert scrape("outbox_destination_down") == 0


async def test_what_is_refused_by_a_part_that_is_away_is_counted_and_the_destination_is_not_down(
    pool: asyncpg.Pool[Any], outbox: Outbox, scrape: Scrape
) -> None:
    metrics = PrometheusMetrics(outbox, registry=scrape.registry, topics=True)
    away = refuses(1, 2, error=DestinationUnavailableError("away"))
    await write(pool, outbox, 1, 2, 3)
    destination, settings = Destination(away), {"hooks": [metrics], "destination_backoff": _hour}
    async with running(outbox, pool, destination, **settings), asyncio.timeout(10):
        await destination.has_accepted(1)
    assert scrape("outbox_unavailable_total", topic="t") == 2
    assert scrape("outbox_destination_down") == scrape("outbox_failed_total") == 0


async def test_failures_and_a_dead_letter_are_counted_by_topic_if_asked_for(
    pool: asyncpg.Pool[Any], outbox: Outbox, scrape: Scrape
) -> None:
    metrics, events = PrometheusMetrics(outbox, registry=scrape.registry, topics=True), Events()
    await write(pool, outbox, "bad")
    destination = Destination(fails("bad"))
    async with running(outbox, pool, destination, hooks=[metrics, events]), asyncio.timeout(10):
        await events.next(MessageDied)
    assert scrape("outbox_failed_total", topic="t") == len(events.of(MessageFailed)) == 2
    assert scrape("outbox_died_total", topic="t") == 1
    assert scrape("outbox_delivered_total", topic="t") is None


async def test_slots_are_owned_together_and_let_go(pool: asyncpg.Pool[Any], outbox: Outbox, scrape: Scrape) -> None:
    hooks = [PrometheusMetrics(outbox, registry=scrape.registry) for _ in range(2)]
    first, second = Events(), Events()
    async with running(outbox, pool, Destination(), order="key", hooks=[hooks[0], first]):
        await scrape.until("outbox_slots_owned", 64)
        async with running(outbox, pool, Destination(), order="key", hooks=[hooks[1], second]), asyncio.timeout(10):
            while not second.of(SlotsOwned) or second.of(SlotsOwned)[-1].slots < 32:
                await second.next(SlotsOwned)
            assert first.of(SlotsOwned)[-1].slots == 32
            assert scrape("outbox_slots_owned") == 64
            assert scrape("outbox_relays") == 2
        assert second.of(SlotsOwned)[-1].slots == 0
        await scrape.until("outbox_slots_owned", 64)
    assert scrape("outbox_slots_owned") == scrape("outbox_relays") == 0


async def test_a_fenced_relay_owns_nothing_until_it_has_begun_anew(
    pool: asyncpg.Pool[Any], outbox: Outbox, scrape: Scrape
) -> None:
    metrics, events = PrometheusMetrics(outbox, registry=scrape.registry), Events()
    lease = timedelta(seconds=1)
    async with running(outbox, pool, Destination(), order="key", hooks=[metrics, events], lease=lease):
        await scrape.until("outbox_slots_owned", 64)
        async with asyncio.timeout(10), pool.acquire() as connection, connection.transaction():
            await connection.execute(f"DELETE FROM {outbox.schema}.outbox_relays")  # noqa: S608 -- as another relay would
            await connection.execute(f"UPDATE {outbox.schema}.outbox_slots SET owner = NULL")  # noqa: S608 -- as above
        await scrape.until("outbox_relays_fenced_total", 1)
        await scrape.until("outbox_slots_owned", 64)
    kinds = [event.slots if isinstance(event, SlotsOwned) else type(event) for event in events.seen]
    assert kinds == [RelayStarted, 64, 0, RelayFenced, 64, 0, RelayStopped]


async def test_slots_handed_over_are_told_while_nothing_can_be_claimed(
    pool: asyncpg.Pool[Any], outbox: Outbox, scrape: Scrape
) -> None:
    hooks = [
        PrometheusMetrics(outbox, registry=CollectorRegistry()),
        PrometheusMetrics(outbox, registry=scrape.registry),
    ]
    inside, go_on = asyncio.Event(), asyncio.Event()

    class Stalled:
        async def dispatch(self, *_: Message) -> None:
            inside.set()
            await go_on.wait()

    full: dict[str, Any] = {"order": "key", "batch_size": 1, "concurrency": 1}
    async with running(outbox, pool, Stalled(), hooks=hooks[1:], **full), asyncio.timeout(10):
        await scrape.until("outbox_slots_owned", 64)
        await write(pool, outbox, *range(1000), key="g")  # of a slot that stays
        await inside.wait()
        held = f"SELECT sum(cardinality(positions)) FROM {outbox.schema}.outbox_claims"  # noqa: S608 -- a test's own
        while await pool.fetchval(held) < 800:  # its hands are full
            pass
        async with running(outbox, pool, Destination(), order="key", hooks=hooks[:1]):
            await until(lambda: (scrape("outbox_slots_owned") or 64) <= 33)  # where it hashes otherwise, one waits
            go_on.set()


async def test_slots_are_told_when_the_answer_to_their_commit_was_lost(
    dsn: str, outbox: Outbox, scrape: Scrape
) -> None:
    cut: list[int] = []

    class Cutting(asyncpg.Connection):
        async def fetch(self, query: str, *args: Any, **options: Any) -> Any:
            if "epoch = " in query and not cut:
                cut.append(id(self))
            return await super().fetch(query, *args, **options)

        async def execute(self, query: str, *args: Any, **options: Any) -> str:
            status: str = await super().execute(query, *args, **options)
            if query.startswith("COMMIT") and cut == [id(self)]:
                cut.append(0)
                self.terminate()
                raise ConnectionResetError("the COMMIT got through, its answer did not")
            return status

    events = Events()
    metrics = PrometheusMetrics(outbox, registry=scrape.registry)
    async with (
        asyncpg.create_pool(dsn, min_size=0, max_size=3, connection_class=Cutting) as pool,
        running(outbox, pool, Destination(), order="key", hooks=[metrics, events]),
    ):
        await scrape.until("outbox_slots_owned", 64)
    assert cut[1:] == [0]
    assert events.of(DatabaseLost)


async def test_run_once_lets_its_slots_go(pool: asyncpg.Pool[Any], outbox: Outbox, scrape: Scrape) -> None:
    metrics, events = PrometheusMetrics(outbox, registry=scrape.registry), Events()
    await write(pool, outbox, 1, key="a")
    assert await Relay(outbox, pool, Destination(), order="key", hooks=[metrics, events]).run_once() == 1
    assert [event.slots for event in events.of(SlotsOwned)] == [64, 0]
    assert scrape("outbox_slots_owned") == 0


async def test_a_relay_that_stands_by_is_seen_until_it_is_at_work(
    pool: asyncpg.Pool[Any], outbox: Outbox, scrape: Scrape
) -> None:
    metrics, events, lease = PrometheusMetrics(outbox, registry=scrape.registry), Events(), timedelta(seconds=1)
    async with (
        running(outbox, pool, Destination(), lease=lease) as at_work,
        running(outbox, pool, Destination(), order="key", hooks=[metrics, events], lease=lease),
    ):
        assert scrape("outbox_relays_standing_by") == 1
        await at_work.stop()
        await scrape.until("outbox_relays_standing_by", 0)
    assert len(events.of(RelayAtWork)) == 1


async def test_a_lost_database_is_counted_and_the_last_figures_tell_their_age(
    own_server: StartServer, scrape: Scrape, caplog: pytest.LogCaptureFixture
) -> None:
    server, outbox = await own_server(), Outbox()
    pool = await asyncpg.create_pool(server.dsn, min_size=1)
    async with pool.acquire() as connection:
        await outbox.migrate(connection)
    metrics, events = PrometheusMetrics(outbox, registry=scrape.registry), Events()
    async with running(outbox, pool, Destination(), hooks=[metrics, events]) as relay, asyncio.TaskGroup() as tasks:
        counting = tasks.create_task(metrics.run(pool, interval=timedelta(milliseconds=10)))
        await scrape.until("outbox_messages_pending", 0)
        with caplog.at_level(logging.WARNING, "outbox"):
            await server.kill()
            async with asyncio.timeout(10):
                await events.next(DatabaseLost)
            await until(lambda: "were not counted" in caplog.text)
        before = scrape("outbox_counted_timestamp_seconds")
        await server.start()
        await until(lambda: scrape("outbox_counted_timestamp_seconds") != before)
        counting.cancel()
        await relay.stop()
    assert (scrape("outbox_database_lost_total") or 0) >= 1
    async with asyncio.timeout(10):
        await pool.close()


def test_what_happens_to_others_is_counted(outbox: Outbox, scrape: Scrape) -> None:
    metrics = PrometheusMetrics(outbox, registry=scrape.registry)
    for event in (
        RelaysDied(2, 10),
        WriterLate(1, timedelta(seconds=3), passed_over=False),
        RelayStandsBy("key"),
        RelayFenced(),
    ):
        metrics(event)
    assert scrape("outbox_relays_died_total") == 2
    assert scrape("outbox_writers_late_total") == 1
    assert scrape("outbox_relays_standing_by") == 0


# --- from the tables ----------------------------------------------------------------------------------------


async def test_what_is_in_the_tables_is_counted_again_and_again(
    pool: asyncpg.Pool[Any], outbox: Outbox, scrape: Scrape
) -> None:
    metrics = PrometheusMetrics(outbox, registry=scrape.registry)
    assert scrape("outbox_messages_pending") is None  # unknown, which is not 0
    async with asyncio.TaskGroup() as tasks:
        counting = tasks.create_task(metrics.run(pool, interval=timedelta(milliseconds=10)))
        await scrape.until("outbox_messages_pending", 0)
        assert scrape("outbox_oldest_pending_seconds") == 0
        await write(pool, outbox, 1, recorded_at=datetime.now(UTC) - timedelta(hours=1))
        await write(pool, outbox, 2, due_at=datetime.now(UTC) + timedelta(hours=1))
        await scrape.until("outbox_messages_pending", 2)
        assert scrape("outbox_messages_waiting") == 1
        assert (scrape("outbox_oldest_pending_seconds") or 0) >= 3600
        await Relay(outbox, pool, Destination(_fails), backoff=FailImmediately()).run_once()
        await scrape.until("outbox_dead_letters", 1)
        assert scrape("outbox_messages_pending") == 1
        counting.cancel()


def _hour(*_: object) -> timedelta:
    return timedelta(hours=1)


def _fails(_: Sequence[Message]) -> None:
    raise ValueError


async def test_counting_ends_with_the_pool_and_gives_its_connection_back_each_time(
    dsn: str, outbox: Outbox, scrape: Scrape
) -> None:
    metrics = PrometheusMetrics(outbox, registry=scrape.registry)
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
        counting = asyncio.create_task(metrics.run(pool, interval=timedelta(milliseconds=10)))
        await scrape.until("outbox_messages_pending", 0)
    async with asyncio.timeout(10):
        await counting


async def test_an_interval_must_be_longer_than_zero(pool: asyncpg.Pool[Any], outbox: Outbox, scrape: Scrape) -> None:
    with pytest.raises(ValueError, match="longer than zero"):
        await PrometheusMetrics(outbox, registry=scrape.registry).run(pool, interval=timedelta())


async def test_tables_that_are_not_there_are_logged_and_end_nothing(
    pool: asyncpg.Pool[Any], scrape: Scrape, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = Outbox(schema="nowhere")
    counting = asyncio.create_task(
        PrometheusMetrics(nowhere, registry=scrape.registry).run(pool, interval=timedelta(milliseconds=10))
    )
    await until(lambda: caplog.text.count("SchemaError") > 1)
    counting.cancel()
    await asyncio.wait([counting])
    assert counting.cancelled()


# --- the registry -------------------------------------------------------------------------------------------


async def test_relays_of_two_outboxes_and_two_of_one_share_a_registry(
    pool: asyncpg.Pool[Any], outbox: Outbox, scrape: Scrape
) -> None:
    other = Outbox("other", schema=outbox.schema)
    async with pool.acquire() as connection:
        await other.migrate(connection)
    await write(pool, outbox, *range(3))
    await write(pool, other, *range(2))
    tables = [outbox, outbox, other]
    hooks = [PrometheusMetrics(table, registry=scrape.registry) for table in tables]
    destination = Destination()
    async with (
        running(outbox, pool, destination, hooks=hooks[:1]),
        running(outbox, pool, destination, hooks=hooks[1:2]),
        running(other, pool, destination, hooks=hooks[2:]),
        asyncio.timeout(10),
    ):
        await destination.has_accepted(5)
        assert scrape("outbox_relays", outbox=f"{outbox.schema}.outbox") == 2
        assert scrape("outbox_relays", outbox=f"{outbox.schema}.other") == 1
    assert scrape("outbox_delivered_total", outbox=f"{outbox.schema}.outbox") == 3
    assert scrape("outbox_delivered_total", outbox=f"{outbox.schema}.other") == 2


def test_two_registries_are_two_worlds(outbox: Outbox, scrape: Scrape) -> None:
    elsewhere = Scrape()
    PrometheusMetrics(outbox, registry=scrape.registry)(DestinationDown(OSError(), timedelta()))
    PrometheusMetrics(outbox, registry=elsewhere.registry)
    assert (scrape("outbox_destination_down"), elsewhere("outbox_destination_down")) == (1, 0)


def test_the_names_keep_to_the_conventions_and_each_metric_is_in_the_docs(outbox: Outbox, scrape: Scrape) -> None:
    PrometheusMetrics(outbox, registry=scrape.registry)
    pages = [(DOCS / "how-to" / page).read_text(encoding="utf-8") for page in ("prometheus.md", "opentelemetry.md")]
    for metric in METRICS:
        assert metric.prometheus.startswith("outbox_")
        assert metric.prometheus.endswith("_total") == (metric.kind == "counter")
        assert metric.prometheus.endswith("_seconds") == (metric.unit == "s")
        assert f"# HELP {metric.prometheus} {metric.text}" in scrape.text
        assert f"| `{metric.prometheus}` |" in pages[0]
        assert f"| `{metric.opentelemetry}` |" in pages[1]
