"""What once went wrong with an order, step by step: each accident is the smallest that brings it about again."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any, Literal

import asyncpg
import pytest

from outbox import CommitStrategy, Message, Outbox
from outbox._claims import Batch, Buried, Postponed, Settlement  # noqa: TID251 -- a relay's steps, one by one
from outbox._membership import Membership  # noqa: TID251 -- the same
from outbox._owning import OnFailure, Owning  # noqa: TID251 -- the same
from outbox.embedded import Server
from tests.conftest import StartServer

pytestmark = pytest.mark.timeout(30)

_HOUR = timedelta(hours=1)
_AT_ONCE = timedelta()

_UNFLUSHED = "10s"
"""What is not waited for reaches the disk after three times this delay: a crash is sure to come before."""

Connect = Callable[[], Awaitable["asyncpg.Connection[Any]"]]


class Hands:
    """A relay, one step of it at a time: each is a transaction of its own, as in the real one."""

    def __init__(self, outbox: Outbox, connection: asyncpg.Connection[Any], owning: Owning, member: Membership) -> None:
        self.outbox = outbox
        self.connection = connection
        self.owning = owning
        self.member = member

    async def transact(self, step: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        async with self.connection.transaction(isolation="read_committed"):
            await self.connection.execute("SET LOCAL synchronous_commit = off")
            return await step(self.connection, *arguments)

    async def join(self) -> None:
        await self.transact(self.member.register)
        await self.balance()

    async def balance(self) -> None:
        if await self.transact(self.owning.balance):
            self.owning.balanced()

    async def claim(self) -> None:
        self.owning.look()
        await self.transact(self.owning.claim)
        self.owning.claimed()

    def take(self) -> Batch:
        batch = self.owning.take()
        assert batch
        return batch

    async def settle(self) -> None:
        while settlement := self.owning.to_settle():
            await self.transact(self.owning.settle, settlement)
            self.owning.settled(settlement)

    def fail(self, batch: Batch, *outcomes: Postponed | Buried) -> None:
        self.owning.failed(batch, outcomes)
        self.owning.done(batch, [])

    def deliver(self) -> list[int]:
        """Accepts whatever may go out; returns the positions."""
        delivered = []
        while batch := self.owning.take():
            delivered += [message.position or 0 for message in batch.messages]
            self.owning.delivered(batch, batch.messages)
            self.owning.done(batch, [])
        return delivered

    async def work(self, rounds: int = 8) -> list[int]:
        """Claims, delivers and settles; returns the positions in the order of their delivery."""
        delivered = []
        for _ in range(rounds):
            await self.settle()
            await self.claim()
            delivered += self.deliver()
        await self.settle()
        return delivered

    async def take_over(self, dead: Hands) -> int:
        """Declares another one dead, which need not know of it, and takes its slots; returns how many are suspects."""
        await self.transact(self.member.register)
        table = f"{self.outbox.schema}.outbox_relays"
        until = f"UPDATE {table} SET until = now() - interval '1 h' WHERE owner = $1"  # noqa: S608 -- our own schema
        await self.connection.execute(until, dead.member.owner)
        taken = await self.transact(self.member.take_over)
        assert taken.relays == 1
        await self.balance()
        return int(taken.messages)


@pytest.fixture
async def connect(dsn: str) -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        async def connect() -> asyncpg.Connection[Any]:
            connection = await asyncpg.connect(dsn)
            stack.callback(connection.terminate)
            return connection

        yield connect


async def hands(
    outbox: Outbox,
    connection: asyncpg.Connection[Any],
    *,
    ordering: Literal["key", "total"] = "key",
    on_failure: OnFailure = "block",
    batch_size: int = 10,
) -> Hands:
    member = Membership(outbox, _HOUR, ordering)
    owning = Owning(
        outbox,
        member,
        ordering=ordering,
        on_failure=on_failure,
        patience=_HOUR,
        batch_size=batch_size,
        concurrency=1,
        commit=CommitStrategy.DELETE,
        lease=_HOUR,
        poll_interval=timedelta(milliseconds=1),
        tell=lambda _: None,
    )
    return Hands(outbox, connection, owning, member)


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(server.dsn)
    try:
        yield connection
    finally:
        connection.terminate()


async def write(outbox: Outbox, connection: asyncpg.Connection[Any], count: int = 1) -> None:
    """Messages of one key."""
    await outbox.persist(connection, *(Message(number, topic="t", key="a") for number in range(count)))


@pytest.mark.parametrize("knows", [True, False], ids=["who knows it", "who does not know it"])
async def test_the_dead_settle_nothing_even_if_they_own_nothing(
    *, knows: bool, connect: Connect, outbox: Outbox, connection: asyncpg.Connection[Any]
) -> None:
    dead, heir = await hands(outbox, await connect()), await hands(outbox, await connect())
    await write(outbox, connection, 300)
    await dead.join()
    await dead.claim()
    await dead.claim()
    batch = dead.take()
    await heir.take_over(dead)
    await heir.claim()  # less than the dead one has in its hands
    dead.owning.doubt()
    if knows:
        dead.fail(batch, *(Postponed(position, _AT_ONCE, 1) for position in range(1, 11)))
        settlement = dead.owning.to_settle()
        assert settlement
        assert not await dead.transact(dead.owning.renew)
        await dead.transact(dead.owning.settle, settlement)
    else:
        await dead.claim()
        dead.fail(batch, *(Postponed(position, _AT_ONCE, 1) for position in range(1, 11)))
        await dead.settle()
    assert await heir.work() == list(range(1, 301))


async def test_what_a_former_incarnation_had_to_settle_does_not_make_the_new_one_stale(
    connect: Connect, outbox: Outbox, connection: asyncpg.Connection[Any]
) -> None:
    lost, heir = await hands(outbox, await connect()), await hands(outbox, await connect())
    await write(outbox, connection, 1)
    await lost.join()
    await lost.claim()
    lost.deliver()
    settlement = lost.owning.to_settle()
    await heir.take_over(lost)
    assert not await lost.transact(lost.owning.renew)
    await lost.balance()  # and has begun anew
    await lost.transact(lost.owning.settle, settlement)
    assert settlement
    assert not lost.owning.settled(settlement)
    assert not lost.owning._is_stale  # noqa: SLF001 -- it would take a lease to show


async def test_a_failure_that_is_settled_with_a_delivery_is_not_forgotten_by_a_crash(
    connect: Connect, outbox: Outbox, connection: asyncpg.Connection[Any]
) -> None:
    relay = await hands(outbox, await connect())
    await outbox.persist(connection, *(Message(1, topic="t", key=key) for key in "ab"))
    await relay.join()
    await relay.claim()
    batch = relay.take()
    accepted, failed = batch.messages
    relay.owning.delivered(batch, [accepted])
    relay.fail(batch, Postponed(failed.position or 0, _AT_ONCE, 1))

    async def settle(connection: asyncpg.Connection[Any], settlement: Settlement) -> str:
        await relay.owning.settle(connection, settlement)
        return str(await connection.fetchval("SHOW synchronous_commit"))

    assert await relay.transact(settle, relay.owning.to_settle()) == "on"


async def test_what_a_crash_forgot_of_the_notes_is_noted_again(
    connect: Connect, outbox: Outbox, connection: asyncpg.Connection[Any]
) -> None:
    first, second, third = [await hands(outbox, await connect()) for _ in range(3)]
    await write(outbox, connection, 300)
    await first.join()
    await first.claim()
    await first.claim()
    await second.take_over(first)
    await second.claim()
    await connection.execute(f"DELETE FROM {outbox.schema}.outbox_claims")  # noqa: S608 -- the crash
    second.owning.doubt()
    await second.claim()
    assert await third.take_over(second) == 200, "all that two dead had in their hands"
    assert (await third.work(3))[0] == 1


async def test_a_relay_that_learns_of_its_death_while_it_rereads_owns_nothing(
    connect: Connect, outbox: Outbox, connection: asyncpg.Connection[Any]
) -> None:
    dead, heir = await hands(outbox, await connect()), await hands(outbox, await connect())
    other = await connect()
    await write(outbox, connection, 3)
    await dead.join()

    class Slow:
        """Has its answer about the slots on the way while others take over."""

        def __init__(self) -> None:
            self.has_struck = False

        def __getattr__(self, name: str) -> Any:
            return getattr(dead.connection, name)

        async def fetch(self, query: str, *arguments: Any) -> Sequence[Any]:
            rows: Sequence[Any] = await dead.connection.fetch(query, *arguments)
            if query == dead.owning._lane_queries.slots and not self.has_struck:  # noqa: SLF001 -- to know it by
                self.has_struck = True
                await heir.take_over(dead)
                async with other.transaction():
                    assert not await dead.owning.renew(other)
            return rows

    slow = Slow()
    async with dead.connection.transaction():
        await dead.owning.claim(slow)  # type: ignore[arg-type]  # it has what is used of a connection
    dead.owning.claimed()
    assert slow.has_struck
    await heir.claim()
    assert dead.deliver() == []
    assert heir.deliver() == [1, 2, 3]


async def test_what_was_given_out_anew_is_not_settled_for_what_was_forgotten(
    connect: Connect, outbox: Outbox, connection: asyncpg.Connection[Any]
) -> None:
    """As after a failover to a standby that was behind: the messages are gone, and their positions taken."""
    relay = await hands(outbox, await connect())
    await relay.join()
    await write(outbox, connection, 3)
    await relay.claim()
    assert relay.deliver() == [1, 2, 3]
    await connection.execute(f"TRUNCATE {outbox.schema}.outbox, {outbox.schema}.outbox_claims RESTART IDENTITY")
    await write(outbox, connection, 3)
    relay.owning.doubt()
    await relay.settle()
    assert (await outbox.counts(connection)).pending == 3
    assert await relay.work() == [1, 2, 3]
    assert (await outbox.counts(connection)).total == 0


async def test_the_dead_take_nothing_back_that_waits(
    connect: Connect, outbox: Outbox, connection: asyncpg.Connection[Any]
) -> None:
    dead, heir = await hands(outbox, await connect()), await hands(outbox, await connect())
    await dead.join()
    await write(outbox, connection)
    await dead.claim()
    dead.fail(dead.take(), Postponed(1, _AT_ONCE, 1))
    await dead.settle()
    await dead.claim()
    await dead.claim()
    assert [message.position for message in dead.take().messages] == [1]
    await write(outbox, connection)
    await heir.take_over(dead)
    dead.owning.doubt()
    await dead.claim()
    assert await heir.work() == [1, 2]


async def test_what_was_given_up_stays_so_though_the_server_forgot_whose_it_was(own_server: StartServer) -> None:
    server, outbox = await own_server(wal_writer_delay=_UNFLUSHED), Outbox()
    async with connected(server) as connection:
        await outbox.migrate(connection)
        relay = await hands(outbox, connection, batch_size=1)
        await relay.join()
        await write(outbox, connection)
        await relay.claim()
        relay.fail(relay.take(), Postponed(1, _AT_ONCE, 1))
        await relay.settle()
        await write(outbox, connection)
        await relay.claim()
        await relay.claim()
        relay.fail(relay.take(), Buried(1, 2, "given up"))
        await server.kill()
    await server.start()
    async with connected(server) as connection:
        owner = await connection.fetchval("SELECT owner FROM outbox_waiting")
        assert owner is None, "the server forgot it"
        relay.connection = connection
        relay.owning.doubt()
        assert await relay.work() == [2]
        assert [letter.message.position for letter in await outbox.dead_letters(connection)] == [1]


async def test_what_came_back_from_the_dead_letters_does_not_go_back_with_a_crash(own_server: StartServer) -> None:
    server, outbox = await own_server(wal_writer_delay=_UNFLUSHED), Outbox()
    async with connected(server) as connection:
        await outbox.migrate(connection)
        relay = await hands(outbox, connection, on_failure="park")
        await relay.join()
        await write(outbox, connection, 2)
        await relay.claim()
        relay.fail(relay.take(), Buried(1, 1, "no"), Postponed(2, _AT_ONCE, 1))
        await relay.settle()
        await write(outbox, connection)
        await relay.claim()
        assert await outbox.redrive(connection) == 2
        await relay.settle()  # the third, behind the first, which is a dead letter no more
        await relay.claim()
        await relay.claim()
        batch = relay.take()
        assert [message.position for message in batch.messages] == [1, 2, 3]
        relay.owning.delivered(batch, batch.messages[:1])
        relay.fail(batch, Buried(2, 1, "no"), Postponed(3, _AT_ONCE, 1))
        await server.kill()
    await server.start()
    async with connected(server) as connection:
        relay.connection = connection
        relay.owning.doubt()
        assert await relay.work() == []
        letters = await outbox.dead_letters(connection)
        assert [(letter.message.position, letter.behind) for letter in letters] == [(2, 2), (3, 2)]


@pytest.mark.parametrize("ordering", ["key", "total"])
async def test_what_is_fresh_below_a_head_goes_before_it(
    ordering: Literal["key", "total"], connect: Connect, outbox: Outbox, connection: asyncpg.Connection[Any]
) -> None:
    first, second = [await hands(outbox, await connect(), ordering=ordering, batch_size=1) for _ in range(2)]
    await first.join()
    await write(outbox, connection, 4)
    await first.claim()
    for position in (1, 2):
        batch = first.take()
        if position == 1:
            first.owning.delivered(batch, batch.messages)
            first.owning.done(batch, [])
        else:
            first.fail(batch, Postponed(2, _AT_ONCE, 1))
    table = f"{outbox.schema}.outbox"
    await connection.execute(f"CREATE TABLE {table}_copy AS SELECT * FROM {table} WHERE position = 1")  # noqa: S608 -- ours
    await first.settle()
    # A server that crashed may have forgotten that it was delivered.
    await connection.execute(f"INSERT INTO {table} SELECT * FROM {table}_copy")  # noqa: S608 -- our own schema
    await second.take_over(first)
    assert await second.work(12) == [1, 2, 3, 4]


async def test_when_a_head_was_removed_by_hand_all_goes_on(
    connect: Connect, outbox: Outbox, connection: asyncpg.Connection[Any]
) -> None:
    relay = await hands(outbox, await connect(), ordering="total", batch_size=1)
    await relay.join()
    await write(outbox, connection)
    await relay.claim()
    relay.fail(relay.take(), Postponed(1, _HOUR, 1))
    await relay.settle()
    await relay.claim()
    await outbox.remove(connection, *await outbox.retrieve(connection, 1))
    await write(outbox, connection)
    assert await relay.work() == [2]
