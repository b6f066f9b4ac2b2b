"""The promises, each by its number."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from itertools import repeat
from time import monotonic
from uuid import UUID

import anyio
import asyncpg
import pytest

from outbox import (
    BatchDelivered,
    CommitStrategy,
    DestinationDown,
    DestinationUnavailableError,
    Dispatcher,
    FailImmediately,
    HandlerDispatcher,
    LinearBackOff,
    Message,
    MessageDied,
    Notifier,
    NoWaiting,
    Outbox,
    OutboxDispatcher,
    OutboxError,
    RejectedError,
    Relay,
    RelaysDied,
    RelayStopped,
)
from outbox._queries import Queries  # noqa: TID251 -- the plans of the real statements are looked at
from outbox.testing import CollectingDispatcher, FailingDispatcher, assert_dispatched, drain
from tests.conformance.obedient_relay import BACKOFF, LEASE, relay_process
from tests.conformance.support import (
    HOUR,
    SECOND,
    Events,
    explain,
    nodes,
    numbered,
    numbers,
    orders,
    plan,
    prepare,
    running,
    statements,
    touched,
    watched_pool,
    write,
)
from tests.conftest import StartServer
from tests.faults import FaultProxy
from tests.pgbouncer import pgbouncer

GRACE = timedelta(seconds=2)
BEGIN = Queries.begin(30_000)
"""How a relay opens its transactions."""
MARGIN = 3.0
"""Seconds that a busy machine may add to a limit."""


class Regret(Exception):  # noqa: N818 -- no error: the reason for a rollback on purpose
    pass


class Gate:
    """A destination in which deliveries stay until it is opened."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        self.accepted = CollectingDispatcher()

    async def dispatch(self, *messages: Message) -> None:
        self.entered.set()
        await self.opened.wait()
        await self.accepted.dispatch(*messages)


@pytest.fixture
def queries(outbox: Outbox) -> Queries:
    return Queries(outbox.table, outbox.schema)


# 1. A message is delivered if and only if its transaction committed. Never lost, whatever is killed.


async def test_promise_1_a_message_is_delivered_if_and_only_if_its_transaction_committed(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    destination = CollectingDispatcher()
    async with running(Relay(outbox, pool, destination)):
        async with connection.transaction():
            await OutboxDispatcher(connection, outbox).dispatch(*numbered(2, start=1))
        with suppress(Regret):
            async with connection.transaction():
                await OutboxDispatcher(connection, outbox).dispatch(*numbered(2, start=101))
                raise Regret
        async with connection.transaction():
            with suppress(Regret):
                async with connection.transaction():
                    await OutboxDispatcher(connection, outbox).dispatch(*numbered(2, start=201))
                    raise Regret
            await OutboxDispatcher(connection, outbox).dispatch(*numbered(2, start=3))
        await destination.wait_for(4)
    assert sorted(numbers(destination.messages)) == [1, 2, 3, 4]
    assert (await outbox.counts(connection)).total == 0


async def test_promise_1_a_writer_that_dies_before_its_commit_leaves_nothing_to_deliver(
    connection: asyncpg.Connection, pool: asyncpg.Pool, dsn: str, outbox: Outbox
) -> None:
    writer = await asyncpg.connect(dsn)
    await writer.execute("BEGIN")
    await outbox.persist(writer, *numbered(3))
    await outbox.persist(connection, *numbered(1, start=4))
    await connection.execute("SELECT pg_terminate_backend($1, 5000)", writer.get_server_pid())
    writer.terminate()
    assert numbers(await drain(outbox, pool)) == [4]


async def test_promise_1_what_commits_late_behind_others_is_delivered_too(
    pool: asyncpg.Pool, dsn: str, outbox: Outbox
) -> None:
    destination = CollectingDispatcher()
    late = await asyncpg.connect(dsn)
    async with running(Relay(outbox, pool, destination)):
        async with late.transaction():
            await outbox.persist(late, *numbered(1))
            await write(pool, outbox, *numbered(500, start=2))
            await destination.wait_for(500)
        assert numbers(await destination.wait_for(501))[-1] == 1
    await late.close()


async def test_promise_1_a_killed_relay_loses_nothing(
    connection: asyncpg.Connection, pool: asyncpg.Pool, dsn: str, outbox: Outbox
) -> None:
    await write(pool, outbox, *numbered(5))
    async with relay_process(dsn, outbox) as process:
        assert list(await process.given()) == [1, 2, 3, 4, 5]
        await process.kill()
    destination = CollectingDispatcher()
    async with running(Relay(outbox, pool, destination, lease=LEASE)):
        await destination.wait_for(5)
    assert numbers(destination.messages) == [1, 2, 3, 4, 5]
    assert (await outbox.counts(connection)).total == 0


async def test_promise_1_a_killed_database_loses_nothing_that_was_committed(own_server: StartServer) -> None:
    server, outbox = await own_server(), Outbox()
    connection = await asyncpg.connect(server.dsn)
    await outbox.migrate(connection)
    await outbox.persist(connection, *numbered(3))
    await connection.execute("BEGIN")
    await outbox.persist(connection, *numbered(3, start=4))
    await server.kill()
    connection.terminate()
    await server.start()
    async with asyncpg.create_pool(server.dsn, min_size=1, max_size=2) as pool:
        assert numbers(await drain(outbox, pool)) == [1, 2, 3]


async def test_promise_1_a_broker_that_is_away_loses_nothing_and_costs_no_attempt(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    accepted = CollectingDispatcher()
    destination = FailingDispatcher([DestinationUnavailableError("away")] * 5, accepted)
    await write(pool, outbox, *numbered(3))
    # The first failure that counted would end it.
    relay = Relay(outbox, pool, destination, destination_backoff=NoWaiting(max_tries=-1), backoff=FailImmediately())
    async with running(relay):
        await accepted.wait_for(3)
    assert len(destination.calls) == 6
    assert numbers(accepted.messages) == [1, 2, 3]
    assert (await outbox.counts(connection)).dead == 0


# 2. At least once: a duplicate only where a crash or an unknown outcome allows it, always with the same id.


async def test_promise_2_a_duplicate_after_a_crash_has_the_same_id(
    pool: asyncpg.Pool, dsn: str, outbox: Outbox
) -> None:
    await write(pool, outbox, *numbered(3))
    async with relay_process(dsn, outbox) as process:
        first = await process.given()
        await process.kill()  # the broker may have accepted them: nobody can know
    destination = CollectingDispatcher()
    async with running(Relay(outbox, pool, destination, lease=LEASE)):
        await destination.wait_for(3)
    assert {message.payload["number"]: message.id for message in destination.messages} == first


async def test_promise_2_a_duplicate_after_a_delivery_out_of_time_has_the_same_id(
    pool: asyncpg.Pool, outbox: Outbox
) -> None:
    seen: list[UUID] = []

    async def accept_and_hang(message: Message) -> None:
        seen.append(message.id)
        if len(seen) == 1:
            await anyio.sleep_forever()

    await write(pool, outbox, *numbered(1))
    relay = Relay(
        outbox, pool, HandlerDispatcher(accept_and_hang), dispatch_timeout=SECOND / 20, backoff=NoWaiting(max_tries=1)
    )
    assert [await relay.run_once() for _ in range(3)] == [0, 1, 0]
    assert len(seen) == 2
    assert len(set(seen)) == 1


async def test_promise_2_nothing_is_delivered_twice_while_relays_come_and_go_and_nothing_crashes(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    destination = CollectingDispatcher()
    await write(pool, outbox, *numbered(3_000))
    async with running(Relay(outbox, pool, destination, batch_size=5)):
        for count in range(200, 2_200, 200):
            async with running(Relay(outbox, pool, destination, batch_size=5)):
                await destination.wait_for(count)
        await destination.wait_for(3_000)
    assert sorted(numbers(destination.messages)) == list(range(1, 3_001))
    assert (await outbox.counts(connection)).total == 0


# 3. No default deletes an undelivered message: it becomes a dead letter, and can be redriven in order.


async def test_promise_3_by_default_what_never_gets_through_becomes_a_dead_letter_and_is_redriven_in_order(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    messages = numbered(5)
    await write(pool, outbox, *messages)
    relay = Relay(outbox, pool, FailingDispatcher(repeat(ConnectionError("away"))))
    rounds = 0
    while (await outbox.counts(connection)).pending:
        assert await relay.run_once() == 0
        # Hours pass.
        await connection.execute("UPDATE outbox_waiting SET due_at = clock_timestamp()")
        rounds += 1
    assert rounds > 10, "it did not give up lightly"
    letters = await outbox.dead_letters(connection)
    assert [letter.message for letter in letters] == messages
    assert {(letter.error, letter.attempts) for letter in letters} == {("ConnectionError: away", rounds)}

    assert await outbox.redrive(connection) == 5
    assert await outbox.dead_letters(connection) == []
    assert await drain(outbox, pool) == messages


async def test_promise_3_what_is_rejected_becomes_a_dead_letter_at_once_and_can_be_redriven(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    def reject_2(messages: tuple[Message, ...]) -> RejectedError | None:
        return RejectedError("no such order") if 2 in numbers(messages) else None

    messages = numbered(3)
    await write(pool, outbox, *messages)
    assert numbers(await drain(outbox, pool, FailingDispatcher(repeat(reject_2)))) == [1, 3]
    [letter] = await outbox.dead_letters(connection)
    assert (letter.message, letter.error) == (messages[1], "RejectedError: no such order")
    assert await outbox.redrive(connection, [messages[0].id]) == 0
    assert await outbox.redrive(connection, [messages[1].id]) == 1
    assert await drain(outbox, pool) == [messages[1]]


async def test_promise_3_marked_messages_are_kept_for_ever_by_default(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    await write(pool, outbox, *numbered(3))
    await drain(outbox, pool, commit=CommitStrategy.MARK)
    await connection.execute("UPDATE outbox SET dispatched_at = '2001-01-01'")
    destination = CollectingDispatcher()
    async with running(Relay(outbox, pool, destination, commit=CommitStrategy.MARK)):
        await write(pool, outbox, *numbered(1))
        await destination.wait_for(1)
    assert (await outbox.counts(connection)).dispatched == 4


# 4. A message that kills the process is found: counted before the dispatch, isolated; the innocent spend no attempts.


async def attempts(connection: asyncpg.Connection, outbox: Outbox) -> dict[int, int]:
    """How many attempts each pending message has spent, by number."""
    return {message.payload["number"]: message.attempts for message in await outbox.retrieve(connection, 100)}


async def test_promise_4_a_message_that_kills_its_process_is_found_and_the_innocent_spend_no_attempts(
    connection: asyncpg.Connection, pool: asyncpg.Pool, dsn: str, outbox: Outbox
) -> None:
    deadly = 3
    await write(pool, outbox, *numbered(5))
    async with relay_process(dsn, outbox) as process:
        assert list(await process.given()) == [1, 2, 3, 4, 5]
        process.tell("exit")
        assert await process.ended() == 1
    async with relay_process(dsn, outbox) as process:
        while list(given := await process.given()) != [deadly]:
            assert len(given) == 1, "suspects are tried alone"
            process.tell("accept")
        assert (await attempts(connection, outbox))[deadly] == 1, "counted before the dispatch"
        process.tell("exit")
        assert await process.ended() == 1
    spent = await attempts(connection, outbox)
    assert spent.pop(deadly) == 1
    assert set(spent.values()) <= {0}, "those that have not been tried yet"

    events, destination = Events(), CollectingDispatcher()
    async with running(Relay(outbox, pool, destination, lease=LEASE, backoff=BACKOFF, hooks=[events])):
        [died] = await events.wait_for(MessageDied)
    assert numbers([died.message]) == [deadly]
    assert deadly not in numbers(destination.messages)
    [letter] = await outbox.dead_letters(connection)
    assert (letter.attempts, "the process died" in letter.error) == (1, True)
    assert [event.messages for event in events.of(RelaysDied)] == [1]
    assert (await outbox.counts(connection)).total == 0

    await outbox.redrive(connection)
    assert numbers(await drain(outbox, pool)) == [deadly]


async def test_promise_4_a_process_that_is_killed_again_and_again_costs_the_innocent_no_attempt(
    connection: asyncpg.Connection, pool: asyncpg.Pool, dsn: str, outbox: Outbox
) -> None:
    await write(pool, outbox, *numbered(3))
    async with relay_process(dsn, outbox) as process:
        assert list(await process.given()) == [1, 2, 3]
    async with relay_process(dsn, outbox) as process:
        assert list(await process.given()) == [1]
    events, destination = Events(), CollectingDispatcher()
    async with running(Relay(outbox, pool, destination, lease=LEASE, backoff=NoWaiting(max_tries=1), hooks=[events])):
        await destination.wait_for(3)
    assert sorted(numbers(destination.messages)) == [1, 2, 3]
    assert (await outbox.counts(connection)).dead == 0


# 6. One bad message delays nothing. 100,000 rows waiting for their retry do not slow fresh ones.


async def test_promise_6_one_bad_message_delays_no_other(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    async def handle(message: Message) -> None:
        if message.payload["number"] == 1:
            raise ValueError("bad")
        await accepted.dispatch(message)

    accepted = CollectingDispatcher()
    await write(pool, outbox, *numbered(10))
    relay = Relay(outbox, pool, HandlerDispatcher(handle), backoff=LinearBackOff(initial=HOUR, maximum=HOUR))
    assert await relay.run_once() == 9
    assert numbers(accepted.messages) == list(range(2, 11))
    assert numbers(await outbox.retrieve(connection, 10)) == [1]


_HUNDRED_THOUSAND = """
    INSERT INTO outbox_waiting (id, topic, payload, due_at, attempts, error)
    SELECT gen_random_uuid(), 'waiting', '1', clock_timestamp() + make_interval(secs => $1 + i / 1000.0), 3, 'Error'
    FROM generate_series(1, 100000) AS i"""


async def test_promise_6_a_hundred_thousand_rows_that_wait_are_not_touched_by_a_claim(
    connection: asyncpg.Connection, dsn: str, outbox: Outbox, queries: Queries
) -> None:
    await connection.execute(_HUNDRED_THOUSAND, 3_600)
    await connection.execute("VACUUM ANALYZE outbox_waiting")
    await outbox.persist(connection, *numbered(100))

    fresh = await plan(connection, BEGIN, queries.lock_fresh, 0, 100)
    assert fresh["Actual Rows"] == 100
    assert "outbox_waiting" not in {node.get("Relation Name") for node in nodes(fresh)}

    async with watched_pool(dsn) as (pool, executed), running(Relay(outbox, pool, CollectingDispatcher())):
        for statement in (queries.claim_due, queries.claim_crash_suspect):
            due = await plan(connection, BEGIN, statement, *await executed.wait_for(statement))
            assert due["Actual Rows"] == 0
            assert touched(due) < 20, "a look at the first entry of the index, and at the relay's own row"


async def test_promise_6_a_hundred_thousand_rows_that_are_due_do_not_hide_the_next_suspect_of_a_crash(
    connection: asyncpg.Connection, queries: Queries
) -> None:
    claimant = UUID(int=1)
    await connection.execute(queries.register, claimant, HOUR, "none")
    await connection.execute(_HUNDRED_THOUSAND, -3_600)
    await connection.execute("VACUUM ANALYZE outbox_waiting")
    suspect = await plan(connection, BEGIN, queries.claim_crash_suspect, claimant)
    assert suspect["Actual Rows"] == 0
    assert touched(suspect) < 20


async def test_promise_6_fresh_messages_are_delivered_past_a_hundred_thousand_that_wait(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    await connection.execute(_HUNDRED_THOUSAND, 3_600)
    destination = CollectingDispatcher()
    async with running(Relay(outbox, pool, destination)):
        await write(pool, outbox, *numbered(1_000))
        await destination.wait_for(1_000)
    assert {message.topic for message in destination.messages} == {"numbers"}
    assert (await outbox.counts(connection)).waiting == 100_000


# 7. The caller's transaction pays for one INSERT and nothing else.


async def test_promise_7_the_callers_transaction_pays_for_one_insert_and_nothing_else(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    with statements(connection) as sent:
        async with connection.transaction():
            await OutboxDispatcher(connection, outbox).dispatch(*numbered(1))
        await asyncio.sleep(0)
    assert [statement.split()[:2] for statement in sent] == [["BEGIN;"], ["INSERT", "INTO"], ["COMMIT;"]]


async def test_promise_7_the_first_call_with_many_messages_on_a_connection_is_one_insert_too(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    with statements(connection) as sent:
        async with connection.transaction():
            await OutboxDispatcher(connection, outbox).dispatch(*numbered(100))
        await asyncio.sleep(0)
    assert [statement.split()[:2] for statement in sent] == [["BEGIN;"], ["INSERT", "INTO"], ["COMMIT;"]]


async def test_promise_7_the_relays_wake_up_adds_nothing_to_the_callers_transaction(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    destination = CollectingDispatcher()
    relay = Relay(outbox, pool, destination, poll_interval=HOUR, listen=True)
    async with anyio.create_task_group() as group:
        await group.start(Notifier(outbox, pool).run)
        async with running(relay):
            with statements(connection) as sent:
                for number in range(1, 4):
                    async with connection.transaction():
                        await OutboxDispatcher(connection, outbox).dispatch(*numbered(1, start=number))
                    await destination.wait_for(number)
        group.cancel_scope.cancel()
    assert [statement.split()[:2] for statement in sent] == [["BEGIN;"], ["INSERT", "INTO"], ["COMMIT;"]] * 3


async def test_promise_7_an_insert_writes_to_the_table_and_its_sequence_alone_and_takes_no_lock_but_theirs(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    written = """
        SELECT relation::regclass::text FROM pg_locks
        WHERE pid = pg_backend_pid() AND locktype = 'relation' AND mode <> 'AccessShareLock'"""
    others = """
        SELECT locktype FROM pg_locks
        WHERE pid = pg_backend_pid() AND locktype NOT IN ('relation', 'virtualxid', 'transactionid')"""
    async with connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(*numbered(1))
        await OutboxDispatcher(connection, outbox).dispatch(*numbered(10))
        assert {row[0] for row in await connection.fetch(written)} == {"outbox", "outbox_position"}
        assert await connection.fetch(others) == [], "neither an advisory lock nor the one of NOTIFY"


@pytest.mark.parametrize(
    ("found", "query"),
    [
        ([], "SELECT tgname::text FROM pg_trigger WHERE tgrelid = 'outbox'::regclass"),
        ([], "SELECT rulename::text FROM pg_rewrite WHERE ev_class = 'outbox'::regclass"),
        (["p"], "SELECT contype::text FROM pg_constraint WHERE conrelid = 'outbox'::regclass AND contype <> 'n'"),
        (["outbox_pkey"], "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'outbox'::regclass"),
    ],
    ids=["no trigger", "no rule", "no constraint but the primary key", "one index"],
)
async def test_promise_7_nothing_hangs_on_the_table_but_its_primary_key(
    connection: asyncpg.Connection, found: list[str], query: str
) -> None:
    assert [row[0] for row in await connection.fetch(query)] == found


# 8. A slow or dead consumer of the database does not slow the relay down: no bloat cliff.


@asynccontextmanager
async def snapshot_held(dsn: str) -> AsyncIterator[None]:
    """Somebody has opened a transaction and forgotten it."""
    forgotten = await asyncpg.connect(dsn)
    transaction = forgotten.transaction(isolation="repeatable_read")
    await transaction.start()
    await forgotten.execute("SELECT 1")
    try:
        yield
    finally:
        await transaction.rollback()
        await forgotten.close()


@pytest.mark.parametrize("commit", CommitStrategy)
async def test_promise_8_a_claim_does_not_walk_over_rows_that_are_dead_but_held_by_an_old_snapshot(
    connection: asyncpg.Connection, dsn: str, outbox: Outbox, queries: Queries, commit: CommitStrategy
) -> None:
    count, destination = 20_000, CollectingDispatcher()
    await outbox.persist(connection, *numbered(count))
    async with snapshot_held(dsn), watched_pool(dsn) as (pool, executed):

        def last_bounds() -> list[int]:
            return [bound for bound, _ in executed.arguments(queries.lock_fresh)][-10:]

        async with running(Relay(outbox, pool, destination, commit=commit, poll_interval=SECOND / 50)):
            await destination.wait_for(count)
            # The cursor and, where the sweeps begin, the floor have moved beyond them.
            await executed.until(lambda: min(last_bounds()) >= count)
        await connection.execute("VACUUM outbox")
        await outbox.persist(connection, *numbered(100))

        claim = await plan(connection, BEGIN, queries.lock_fresh, count, 10)
        assert claim["Actual Rows"] == 10
        assert touched(claim) < 40
        floor = await plan(connection, BEGIN, queries.lowest_fresh, count, count + 100)
        assert touched(floor) < 40
        without_bound = await plan(connection, BEGIN, queries.lock_fresh, 0, 10)
        assert touched(without_bound) > 10 * touched(claim), "the dead rows are there, and would be walked over"


async def test_promise_8_a_claim_walks_along_the_primary_key_though_it_was_planned_for_an_empty_table(
    connection: asyncpg.Connection, outbox: Outbox, queries: Queries
) -> None:
    await connection.execute("ANALYZE outbox, outbox_claims")
    await prepare(connection, BEGIN, queries.lock_fresh)
    await explain(connection, BEGIN, 0, 100)
    await outbox.persist(connection, *numbered(20_000))
    claimed = "INSERT INTO outbox_claims VALUES (1000, gen_random_uuid(), ARRAY(SELECT generate_series(1, 1000)))"
    await connection.execute(claimed)

    claim = await explain(connection, BEGIN, 0, 100)

    assert claim["Actual Rows"] == 100
    [scan] = [node for node in nodes(claim) if node.get("Relation Name") == "outbox"]
    assert (scan["Node Type"], scan["Index Name"]) == ("Index Scan", "outbox_pkey")
    assert "hashed SubPlan" in scan["Filter"], "one look at the claims, not one for each row"
    assert "Sort" not in {node["Node Type"] for node in nodes(claim)}
    assert touched(claim) < 500


async def test_promise_8_a_claim_looks_up_what_is_held_in_a_hash_whatever_statistics_make_of_it(
    connection: asyncpg.Connection, outbox: Outbox, queries: Queries
) -> None:
    """Long claims were analyzed, and then the table was truncated: now it is taken for ten full pages of such."""
    await connection.execute("""INSERT INTO outbox_claims
        SELECT n, gen_random_uuid(), ARRAY(SELECT generate_series(1, 2000)) FROM generate_series(1, 20) AS n""")
    await connection.execute("ANALYZE outbox_claims")
    await connection.execute("TRUNCATE outbox_claims")
    await outbox.persist(connection, *numbered(10))

    claim = await plan(connection, BEGIN, queries.lock_fresh, 0, 100)

    [scan] = [node for node in nodes(claim) if node.get("Relation Name") == "outbox"]
    assert "hashed SubPlan" in scan["Filter"]


# 9. Shutdown: stop claiming, let deliveries finish within the grace period, settle, then go. Never hang.


async def test_promise_9_stop_claims_nothing_more_lets_a_delivery_finish_and_settles_it(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    gate = Gate()
    await write(pool, outbox, *numbered(3))
    relay = Relay(outbox, pool, gate)
    async with anyio.create_task_group() as group:
        await group.start(relay.run)
        await gate.entered.wait()
        stopping = asyncio.create_task(relay.stop())
        await asyncio.sleep(0)  # one turn of the loop: it has begun to stop
        await write(pool, outbox, *numbered(1, start=4))
        gate.opened.set()
        await stopping
    assert numbers(gate.accepted.messages) == [1, 2, 3]
    assert numbers(await outbox.retrieve(connection, 10)) == [4]


async def test_promise_9_a_delivery_that_never_returns_is_cancelled_within_the_grace_and_given_back(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    events, gate = Events(), Gate()
    await write(pool, outbox, *numbered(3))
    async with running(Relay(outbox, pool, gate, grace=GRACE / 2, hooks=[events])):
        await gate.entered.wait()
        began = monotonic()
    assert monotonic() - began < (GRACE / 2).total_seconds() + MARGIN
    assert [event.given_back for event in events.of(RelayStopped)] == [3]
    retrieved = await outbox.retrieve(connection, 10)
    assert [(message.payload["number"], message.attempts) for message in retrieved] == [(1, 0), (2, 0), (3, 0)]
    assert numbers(await drain(outbox, pool)) == [1, 2, 3], "they are due at once, for any relay"


async def test_promise_9_messages_that_wait_for_a_destination_that_is_down_do_not_delay_the_exit(
    pool: asyncpg.Pool, outbox: Outbox
) -> None:
    events, destination = Events(), FailingDispatcher(repeat(DestinationUnavailableError("away")))
    await write(pool, outbox, *numbered(3))
    patient = LinearBackOff(initial=HOUR, maximum=HOUR, max_tries=-1)
    async with running(Relay(outbox, pool, destination, destination_backoff=patient, hooks=[events])):
        await events.wait_for(DestinationDown)
        began = monotonic()
    assert monotonic() - began < MARGIN
    assert numbers(await drain(outbox, pool)) == [1, 2, 3]


async def test_promise_9_a_cancelled_relay_settles_what_it_knows_and_gives_back_the_rest(
    pool: asyncpg.Pool, outbox: Outbox
) -> None:
    accepted, hanging = CollectingDispatcher(), asyncio.Event()

    async def handle(message: Message) -> None:
        if message.payload["number"] == 3:
            hanging.set()
            await anyio.sleep_forever()
        await accepted.dispatch(message)

    await write(pool, outbox, *numbered(5))
    relay = Relay(outbox, pool, HandlerDispatcher(handle), batch_size=1, concurrency=1)
    async with anyio.create_task_group() as group:
        await group.start(relay.run)
        await hanging.wait()
        group.cancel_scope.cancel()
    assert numbers(accepted.messages) == [1, 2]
    assert numbers(await drain(outbox, pool)) == [3, 4, 5]


@asynccontextmanager
async def pool_through(dsn: str) -> AsyncIterator[asyncpg.Pool]:
    """A pool whose connections may be lost for ever; closing it would wait for them."""
    pool = await asyncpg.create_pool(dsn, min_size=2, max_size=4)
    try:
        yield pool
    finally:
        pool.terminate()


@pytest.mark.parametrize("end", ["stop", "cancel"])
@pytest.mark.parametrize("state", ["idle", "delivering"])
async def test_promise_9_a_connection_that_swallows_everything_does_not_hang_the_exit(
    dsn: str, proxy: FaultProxy, outbox: Outbox, state: str, end: str
) -> None:
    events, gate = Events(), Gate()
    async with pool_through(proxy.dsn(dsn)) as pool, anyio.create_task_group() as group:
        await write(pool, outbox, *numbered(3))
        relay = Relay(outbox, pool, gate, grace=GRACE, hooks=[events])
        await group.start(relay.run)
        await gate.entered.wait()
        if state == "idle":
            gate.opened.set()
            await events.wait_for(BatchDelivered)
        proxy.black_hole()
        began = monotonic()
        if end == "stop":
            await relay.stop()
            assert monotonic() - began < GRACE.total_seconds() + 1
        else:
            group.cancel_scope.cancel()
    assert monotonic() - began < GRACE.total_seconds() + MARGIN


async def test_promise_9_a_single_batch_does_not_wait_for_a_connection_that_swallows_everything(
    dsn: str, proxy: FaultProxy, outbox: Outbox
) -> None:
    async with pool_through(proxy.dsn(dsn)) as pool:
        proxy.black_hole()
        began = monotonic()
        with pytest.raises(OutboxError) as caught:
            await Relay(outbox, pool, CollectingDispatcher(), lease=SECOND, grace=GRACE).run_once()
        assert isinstance(caught.value.__cause__, TimeoutError)
        assert monotonic() - began < GRACE.total_seconds() + MARGIN


# 10. It works through PgBouncer in transaction mode: no session state is relied on.


_ORDER = 'INSERT INTO "{schema}".orders VALUES ($1)'


class Inspector:
    """A destination that looks at the session of the server between two transactions of the relays."""

    def __init__(self, connection: asyncpg.Connection, inner: Dispatcher) -> None:
        self._connection = connection
        self._inner = inner
        self._lock = anyio.Lock()
        self.sessions: list[list[tuple[str, ...]]] = []

    async def dispatch(self, *messages: Message) -> None:
        await self.inspect()
        await self._inner.dispatch(*messages)

    async def inspect(self) -> None:
        async with self._lock:
            self.sessions.append([tuple(row) for row in await self._connection.fetch("SHOW ALL")])


async def test_promise_10_the_main_job_works_through_pgbouncer_in_transaction_mode(
    connection: asyncpg.Connection, dsn: str, outbox: Outbox
) -> None:
    mine, accepted, events = Outbox("pooled", schema=outbox.schema), CollectingDispatcher(), Events()

    def reject_1(messages: tuple[Message, ...]) -> RejectedError | None:
        return RejectedError("bad") if 1 in numbers(messages) else None

    async def order(first: int) -> None:
        for number in range(first, first + 50):
            with suppress(Regret):
                async with pool.acquire() as writer, writer.transaction():
                    await writer.execute(_ORDER.format(schema=outbox.schema), number)
                    await OutboxDispatcher(writer, mine).dispatch(*numbered(1, start=number))
                    if number % 5 == 0:
                        raise Regret

    # All of them share one connection of the server, from transaction to transaction.
    async with (
        pgbouncer(dsn, pool_size=1) as through,
        asyncpg.create_pool(through, min_size=1, max_size=10, statement_cache_size=0) as pool,
    ):
        async with pool.acquire() as pooled:
            await mine.migrate(pooled)
        destination = FailingDispatcher([ConnectionError("away"), *repeat(reject_1, 1_000)], accepted)
        inspector = Inspector(await asyncpg.connect(through, statement_cache_size=0), destination)
        await inspector.inspect()
        relays = [Relay(mine, pool, inspector, batch_size=10, backoff=NoWaiting(), hooks=[events]) for _ in range(2)]
        async with running(*relays), anyio.create_task_group() as writers:
            for first in (0, 50, 100, 150):
                writers.start_soon(order, first)
            await accepted.wait_for(159)
            await events.wait_for(MessageDied)
        before, *during = inspector.sessions
        assert len(during) > 10
        changed = {setting for session in during for setting in session if setting not in before}
        assert changed == set(), "no setting stays behind"
    committed = [number for number in range(200) if number % 5]
    assert await orders(connection) == committed
    assert sorted([1, *numbers(accepted.messages)]) == committed
    assert numbers(letter.message for letter in await mine.dead_letters(connection)) == [1]
    assert (await mine.counts(connection)).total == 0


_BACKLOG = """
    INSERT INTO "{schema}".outbox (id, topic, payload)
    SELECT gen_random_uuid(), 'orders', '1' FROM generate_series(1, {count})"""


async def test_promise_10_a_busy_relay_leaves_the_only_connection_of_a_pooler_to_others(
    connection: asyncpg.Connection, dsn: str, outbox: Outbox
) -> None:
    backlog, destination = 100_000, CollectingDispatcher()
    await connection.execute(_BACKLOG.format(schema=outbox.schema, count=backlog))
    async with (
        pgbouncer(dsn, pool_size=1) as through,
        asyncpg.create_pool(through, min_size=1, max_size=10, statement_cache_size=0) as pool,
        # It tries for a tenth of the lease to settle beside its claims: so long others wait if it clings to the one.
        running(Relay(outbox, pool, destination, lease=timedelta(seconds=60))),
    ):
        await destination.wait_for(1)
        for _ in range(5):
            async with asyncio.timeout(5):
                await pool.fetchval("SELECT 1")
        assert len(destination.messages) < backlog, "it was busy all the time"


async def test_promise_10_the_helpers_for_tests_work_through_it_too(pgbouncer_dsn: str, outbox: Outbox) -> None:
    async with asyncpg.create_pool(pgbouncer_dsn, min_size=1, max_size=4, statement_cache_size=0) as pool:
        messages = numbered(10)
        await write(pool, outbox, *messages)
        assert_dispatched(await drain(outbox, pool, batch_size=3), *messages)
