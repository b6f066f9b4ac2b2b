# ruff: noqa: S608 -- the tables are our own, and the ids of messages parameters
"""Whatever is written, claimed, answered, killed, redriven and cleaned up: the tables hold what a simple model says.

The relays are real. One is paused in the middle of its batch for as long as other steps please to come between, and
may meanwhile die, or be taken for dead and go on. HYPOTHESIS_PROFILE=long looks for minutes instead of seconds.
"""

import asyncio
import os
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from outbox import (
    CommitStrategy,
    DestinationUnavailableError,
    Message,
    Outbox,
    OutboxDispatcher,
    OutboxError,
    PartialDispatchError,
    RejectedError,
    Relay,
)

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
_SETTINGS = settings(
    max_examples=2_500 if LONG else 50,
    stateful_step_count=60 if LONG else 35,
    derandomize=not LONG,
    deadline=None,
    print_blob=True,
    phases=[Phase.generate],  # shrinking takes longer than the time limit, and the steps are few
    suppress_health_check=list(HealthCheck),
)
_MAX_TRIES = 3
_HOUR = timedelta(hours=1)
_SLOTS = 3


def backoff(attempts: int, _: BaseException | None) -> timedelta | None:
    """Gives up after the fourth; every second retry waits for an hour, which only a rule makes pass."""
    return None if attempts > _MAX_TRIES else timedelta() if attempts % 2 else _HOUR


# --- the model ------------------------------------------------------------------------------------------


@dataclass
class Known:
    """What the model knows of a message that is in one of the tables."""

    state: str
    """fresh, waiting, dead or dispatched."""
    position: int = 0
    due: bool = True
    attempts: int = 0
    suspect: str | None = None
    holder: UUID | None = None


@dataclass
class Outcome:
    """What a settle is about to do to a message. Without a state it was accepted."""

    name: UUID
    state: str | None = None
    due: bool = True
    attempts: int = 0
    suspect: str | None = None


@dataclass
class Batch:
    names: list[UUID]
    suspect: str | None = None


def decide(batch: Batch, name: UUID, attempts: int, kind: str, *, shared: bool) -> Outcome:
    """What the documentation says of a failure: alone or named it counts, shared by a batch it kills nobody."""
    result = Outcome(name, "waiting", suspect=batch.suspect, attempts=attempts)
    is_counted = batch.suspect == "crash"  # when it was claimed
    if kind == "unavailable":
        result.attempts -= is_counted
        return result
    tried = attempts if is_counted else attempts + 1
    delay = None if kind == "rejected" else backoff(tried, None)
    if shared and delay is None:
        result.suspect = "batch"
    elif delay is None:
        result.state, result.attempts, result.suspect = "dead", tried, None
    else:
        alone = attempts > 0 if shared else len(batch.names) == 1
        result.attempts, result.due, result.suspect = tried, not delay, "batch" if alone else None
    return result


# --- a relay that can be paused -------------------------------------------------------------------------


class Paused(Exception):  # noqa: N818 -- no error: how a destination is told that its process is gone
    pass


@dataclass(eq=False)
class Run:
    """One `run_once`, from its claim to its settle."""

    pool: asyncpg.Pool
    calls: "asyncio.Queue[tuple[Message, ...]]" = field(default_factory=asyncio.Queue)
    answers: "asyncio.Queue[BaseException | None]" = field(default_factory=asyncio.Queue)
    owner: UUID | None = None
    plan: list[Batch] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    call: tuple[Message, ...] = ()

    def begin(self, outbox: Outbox, size: int, commit: CommitStrategy, **settings: Any) -> None:
        # The lease is longer than any test: a rule ends it.
        relay = Relay(outbox, self.pool, self, batch_size=size, commit=commit, backoff=backoff, lease=_HOUR, **settings)
        self.task = asyncio.create_task(relay.run_once())

    async def dispatch(self, *messages: Message) -> None:
        self.calls.put_nowait(messages)
        if error := await self.answers.get():
            raise error

    async def is_called(self) -> bool:
        """Waits for the next call; False when there was none and the run has ended."""
        call = asyncio.create_task(self.calls.get())
        await asyncio.wait([call, self.task], return_when=asyncio.FIRST_COMPLETED)
        if call.done():
            self.call = call.result()
            return True
        call.cancel()
        return False


# --- the rules ------------------------------------------------------------------------------------------

_KINDS = ["accepted", "accepted", "error", "error", "rejected", "unavailable"]
_ERRORS = {"error": ValueError, "rejected": RejectedError, "unavailable": DestinationUnavailableError}
_COUNT = st.integers(1, 4)
_WHICH = st.integers(0, 5)
_SUBSET = st.integers(0, 15)


class Machine(RuleBasedStateMachine):
    """Real tables and real relays on one side, a dictionary on the other."""

    dsn: ClassVar[str]
    runner: ClassVar[asyncio.Runner]
    connection: ClassVar[asyncpg.Connection]
    writer: ClassVar[asyncpg.Connection]
    pools: ClassVar[list[asyncpg.Pool]]
    outbox: ClassVar[Outbox]
    steps: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[UUID, Known] = {}
        self.relays: dict[UUID, bool] = {}
        """Those registered, and whether their lease has run out."""
        self.runs: list[Run | None] = [None] * _SLOTS
        self.unseen: list[UUID] | None = None
        """What was written in a transaction that is still open."""
        self.table = f'"{self.outbox.schema}"."{self.outbox.table}'

    def do(self, work: Any) -> Any:
        return self.runner.run(work)

    def has(self, state: str) -> bool:
        return any(known.state == state for known in self.known.values())

    def is_there_work(self) -> bool:
        waiting = (known for known in self.known.values() if known.due and not known.holder)
        return any(known.state in {"fresh", "waiting"} for known in waiting) or any(self.relays.values())

    def tick(self, what: str) -> None:
        self.steps[what] += 1

    @initialize(commit=st.sampled_from(CommitStrategy), size=_COUNT)
    def begin(self, commit: CommitStrategy, size: int) -> None:
        self.commit, self.size = commit, size
        self.do(self.outbox.clear(self.connection))
        self.do(self.connection.execute(f'DELETE FROM {self.table}_relays"'))
        self.write(2 * size, later=None)
        self.write(size, later=False)

    def teardown(self) -> None:
        self.do(self._teardown())

    async def _teardown(self) -> None:
        for slot, run in enumerate(self.runs):
            if run:
                await self._die(slot, run)
        if self.unseen is not None:
            await self.writer.execute("ROLLBACK")

    # --- writing

    @rule(count=_COUNT, later=st.sampled_from([None, False, True]))
    def write(self, count: int, *, later: bool | None) -> None:
        """Fresh ones, or delayed ones whose time has come or not."""
        due = None if later is None else datetime.now(UTC) + (_HOUR if later else -_HOUR)
        messages = [Message(n, topic="t", due_at=due) for n in range(count)]
        self.do(self._write(self.connection, messages, regret=False))
        for message in messages:
            self.known[message.id] = Known("fresh" if due is None else "waiting", due=not later)
        self.do(self._learn_positions())

    @rule(count=_COUNT)
    def write_and_roll_back(self, count: int) -> None:
        self.do(self._write(self.connection, [Message(n, topic="t") for n in range(count)], regret=True))

    async def _write(self, connection: asyncpg.Connection, messages: list[Message], *, regret: bool) -> None:
        transaction = connection.transaction()
        await transaction.start()
        await OutboxDispatcher(connection, self.outbox).dispatch(*messages)
        await (transaction.rollback() if regret else transaction.commit())

    @precondition(lambda self: self.unseen is None)
    @rule(count=_COUNT)
    def begin_a_transaction(self, count: int) -> None:
        messages = [Message(n, topic="t") for n in range(count)]
        self.do(self.writer.execute("BEGIN"))
        self.do(OutboxDispatcher(self.writer, self.outbox).dispatch(*messages))
        self.unseen = [message.id for message in messages]

    @precondition(lambda self: self.unseen is not None)
    @rule(regret=st.booleans())
    def end_the_transaction(self, *, regret: bool) -> None:
        self.do(self.writer.execute("ROLLBACK" if regret else "COMMIT"))
        self.known |= {name: Known("fresh") for name in self.unseen or () if not regret}
        self.unseen = None
        self.do(self._learn_positions())

    async def _learn_positions(self) -> None:
        for message in await self.outbox.retrieve(self.connection, 10_000):
            assert message.position is not None
            self.known[message.id].position = message.position

    # --- relaying

    @precondition(lambda self: None in self.runs and self.is_there_work())
    @rule()
    def claim(self) -> None:
        self.do(self._claim(self.runs.index(None)))

    async def _claim(self, slot: int) -> None:
        self._take_over()
        run = Run(self.pools[slot])
        fresh = sorted(self._those("fresh"), key=lambda name: self.known[name].position)[: self.size]
        due = [] if fresh else await self._due_by_time()
        suspects = set() if fresh else set(self._those("waiting", "crash"))
        buried = await self._dead()
        run.begin(self.outbox, self.size, self.commit)
        called = await run.is_called()
        if called:
            registered = await self.connection.fetch(f'SELECT owner FROM {self.table}_relays"')
            (run.owner,) = {row["owner"] for row in registered} - set(self.relays)
            self.relays[run.owner] = False
            held = await self._held_by(run.owner)
        else:
            held = await self._dead() - buried  # at most one suspect, given up without being tried
        chosen = held - set(fresh) - set(due)
        assert held == set(fresh) | set(due) | chosen
        assert chosen <= suspects
        assert len(chosen) == bool(suspects)
        run.plan = self._batches(fresh, due, chosen)
        for name in held:
            self.known[name].holder = run.owner
            self.known[name].attempts += name in chosen
        self.runs[slot] = run
        self.tick("claimed fresh" if fresh else "claimed due" if due else "claimed a suspect" if chosen else "nothing")
        self._give_up_a_suspect(run)
        await self._go_on(slot, run, called=called)

    def _batches(self, fresh: list[UUID], due: list[UUID], suspects: set[UUID]) -> list[Batch]:
        together = fresh or [name for name in due if self.known[name].suspect is None]
        alone = [Batch([name], "batch") for name in due if self.known[name].suspect]
        return [*([Batch(together)] if together else []), *alone, *(Batch([name], "crash") for name in suspects)]

    def _give_up_a_suspect(self, run: Run) -> None:
        last = run.plan[-1] if run.plan else None
        if last and last.suspect == "crash":
            deaths = self.known[last.names[0]].attempts - 1
            if deaths and backoff(deaths, None) is None:
                del run.plan[-1]
                run.outcomes.append(Outcome(last.names[0], state="dead", attempts=deaths))
                self.tick("gave up a suspect")

    async def _go_on(self, slot: int, run: Run, *, called: bool) -> None:
        """Checks the call against the plan; or that the run has ended, and what it settled."""
        if called:
            batch = run.plan[0]
            assert [message.id for message in run.call] == batch.names
            return
        assert not run.plan
        assert await run.task == sum(outcome.state is None for outcome in run.outcomes)
        for outcome in run.outcomes:
            self._settle(run, outcome)
        self.relays.pop(run.owner, None)  # type: ignore[arg-type]  # None if there was nothing to claim
        self.runs[slot] = None

    def _settle(self, run: Run, outcome: Outcome) -> None:
        known = self.known.get(outcome.name)
        if known is None:
            return
        if outcome.state is None:
            # Accepted is accepted, whoever holds it by now.
            if known.state in {"fresh", "waiting"}:
                self._delivered(outcome.name)
        elif known.holder == run.owner and known.state in {"fresh", "waiting"}:
            known.state, known.holder = outcome.state, None
            known.attempts, known.due, known.suspect = outcome.attempts, outcome.due, outcome.suspect
            self.tick("buried" if outcome.state == "dead" else "postponed")
        else:
            self.tick("a stale settle")

    def _delivered(self, name: UUID) -> None:
        self.tick("delivered")
        if self.commit is CommitStrategy.DELETE:
            del self.known[name]
        else:
            self.known[name] = Known("dispatched", self.known[name].position)

    @precondition(lambda self: any(self.runs))
    @rule(which=_WHICH, kind=st.sampled_from(_KINDS), subset=st.none() | _SUBSET)
    def answer(self, which: int, kind: str, subset: int | None) -> None:
        """Accepts the call, raises for all of it, or names a subset."""
        slot, run = self._one_of_the_runs(which)
        self.do(self._answer(slot, run, kind, subset))

    @precondition(lambda self: any(self.runs))
    @rule(which=_WHICH, kind=st.sampled_from(_KINDS))
    def answer_to_the_end(self, which: int, kind: str) -> None:
        """Accepts or raises for every call that is left to a relay."""
        slot, run = self._one_of_the_runs(which)
        while self.runs[slot] is run:
            self.do(self._answer(slot, run, kind, None))

    def _one_of_the_runs(self, which: int) -> tuple[int, Run]:
        runs = [(slot, run) for slot, run in enumerate(self.runs) if run]
        return runs[which % len(runs)]

    async def _answer(self, slot: int, run: Run, kind: str, subset: int | None) -> None:
        batch, error = run.plan.pop(0), None
        failed: set[UUID] = set()
        shared = subset is None and len(batch.names) > 1
        if kind != "accepted":
            failed = {name for n, name in enumerate(batch.names) if subset is None or subset >> n & 1}
            error = _ERRORS[kind](kind)
            if subset is not None:
                shared = subset % 2 == 0 and len(failed) > 1  # one error for several, or to each its own
                errors = {name: error if shared else _ERRORS[kind](kind) for name in failed}
                error = PartialDispatchError({uuid4(): ValueError("a stranger"), **errors})
        for message in run.call:
            if message.id in failed:
                run.outcomes.append(decide(batch, message.id, message.attempts, kind, shared=shared))
            else:
                run.outcomes.append(Outcome(message.id))
        run.answers.put_nowait(error)
        await self._go_on(slot, run, called=await run.is_called())

    @precondition(lambda self: any(self.runs))
    @rule(which=_WHICH)
    def die(self, which: int) -> None:
        self.tick("died")
        self.do(self._die(*self._one_of_the_runs(which)))

    async def _die(self, slot: int, run: Run) -> None:
        """The process ends: all its connections are cut, and nobody settles anything."""
        run.pool.terminate()
        run.answers.put_nowait(Paused())
        while await run.is_called():
            run.answers.put_nowait(Paused())
        with pytest.raises(OutboxError):
            await run.task
        self.pools[slot] = await _new_pool(self.dsn)
        self.runs[slot] = None

    @precondition(lambda self: self.relays)
    @rule(which=_WHICH)
    def lease_ends(self, which: int) -> None:
        """Of one that died, or of one that goes on and does not know it."""
        owner = list(self.relays)[which % len(self.relays)]  # in the order of their registration
        self.do(
            self.connection.execute(
                f'UPDATE {self.table}_relays" SET until = clock_timestamp() WHERE owner = $1',
                owner,
            )
        )
        self.relays[owner] = True

    def _take_over(self) -> None:
        """What the next relay does first of all."""
        dead = {owner for owner, ended in self.relays.items() if ended}
        for owner in dead:
            del self.relays[owner]
            self.tick("taken over")
        for known in self.known.values():
            if known.holder in dead:
                known.state, known.suspect, known.due, known.holder = "waiting", "crash", True, None

    @precondition(lambda self: not all(known.due for known in self.known.values()))
    @rule()
    def time_passes(self) -> None:
        query = f"UPDATE {self.table}_waiting\" SET due_at = due_at - interval '2 h' WHERE due_at > clock_timestamp()"
        self.do(self.connection.execute(query))
        for known in self.known.values():
            known.due = True

    # --- the operator

    @precondition(lambda self: self.has("dead"))
    @rule(subset=st.none() | _SUBSET)
    def redrive(self, subset: int | None) -> None:
        names = self._some_dead(subset)
        count = self.do(self.outbox.redrive(self.connection, None if subset is None else names))
        assert count == len(names)
        for name in names:
            self.tick("redriven")
            self.known[name] = Known("waiting", self.known[name].position)

    @precondition(lambda self: self.has("dead"))
    @rule(subset=_SUBSET)
    def discard(self, subset: int) -> None:
        names = self._some_dead(subset)[:1]
        assert self.do(self.outbox.discard(self.connection, names)) == len(names)
        for name in names:
            del self.known[name]

    def _some_dead(self, subset: int | None) -> list[UUID]:
        dead = [name for name, known in self.known.items() if known.state == "dead"]
        return [name for n, name in enumerate(dead) if subset is None or subset >> (n % 4) & 1]

    @precondition(lambda self: self.has("dispatched"))
    @rule(limit=_COUNT)
    def clean_up(self, limit: int) -> None:
        """The oldest of those that were dispatched go first."""
        marked = [(known.position, name) for name, known in self.known.items() if known.state == "dispatched"]
        gone = sorted(marked)[:limit]
        assert self.do(self.outbox.cleanup(self.connection, timedelta(), limit)) == len(gone)
        for _, name in gone:
            self.tick("cleaned up")
            del self.known[name]

    # --- what must be, after each step

    @invariant()
    def the_tables_are_as_the_model_says(self) -> None:
        if hasattr(self, "commit"):
            self.do(self._compare())

    async def _compare(self) -> None:
        rows = await self.connection.fetch(f"""
            SELECT o.id, CASE WHEN dispatched_at IS NULL THEN 'fresh' ELSE 'dispatched' END AS state, o.position,
                true AS due, 0 AS attempts, NULL AS suspect, c.owner AS holder
            FROM {self.table}" o LEFT JOIN {self.table}_claims" c
                ON o.position = ANY(c.positions) AND dispatched_at IS NULL
            UNION ALL SELECT id, 'waiting', position, due_at <= clock_timestamp(), attempts, suspect, owner
            FROM {self.table}_waiting"
            UNION ALL SELECT id, 'dead', position, true, attempts, NULL, NULL FROM {self.table}_dead" """)
        there = {row["id"]: Known(*list(row.values())[1:]) for row in rows}
        assert len(there) == len(rows), "a message is in one table only, and in one claim"
        assert there == self.known
        registered = await self.connection.fetch(f'SELECT owner FROM {self.table}_relays"')
        assert {row["owner"] for row in registered} == set(self.relays)
        claimers = await self.connection.fetch(f'SELECT owner FROM {self.table}_claims"')
        assert {row["owner"] for row in claimers} <= set(self.relays), "nothing is held by nobody"
        assert {known.holder for known in there.values()} - {None} <= set(self.relays)
        await self._compare_counts()

    async def _compare_counts(self) -> None:
        states = Counter(known.state for known in self.known.values())
        counts = await self.outbox.counts(self.connection)
        assert (counts.dispatched, counts.waiting, counts.dead) == (
            states["dispatched"],
            states["waiting"],
            states["dead"],
        )
        assert counts.pending == states["fresh"] + states["waiting"] == counts.total - counts.dispatched

    # --- looking

    def _those(self, state: str, suspect: str | None = None) -> list[UUID]:
        return [
            name
            for name, known in self.known.items()
            if known.state == state and known.suspect == suspect and known.due and known.holder is None
        ]

    async def _due_by_time(self) -> list[UUID]:
        rows = await self.connection.fetch(
            f"""SELECT id FROM {self.table}_waiting" WHERE id = ANY($1) ORDER BY due_at, position""",
            self._those("waiting") + self._those("waiting", "batch"),
        )
        return [row["id"] for row in rows][: self.size]

    async def _held_by(self, owner: UUID) -> set[UUID]:
        rows = await self.connection.fetch(
            f"""
            SELECT id FROM {self.table}_waiting" WHERE owner = $1 UNION ALL
            SELECT id FROM {self.table}" o JOIN {self.table}_claims" c ON position = ANY(positions) WHERE owner = $1""",
            owner,
        )
        return {row["id"] for row in rows}

    async def _dead(self) -> set[UUID]:
        return {letter.message.id for letter in await self.outbox.dead_letters(self.connection, limit=10_000)}


async def _new_pool(dsn: str) -> asyncpg.Pool:
    return await asyncpg.create_pool(dsn, min_size=0, max_size=2)


@pytest.mark.timeout(3600 if LONG else 150)
@pytest.mark.filterwarnings("default::hypothesis.errors.NonInteractiveExampleWarning")
def test_the_tables_are_what_a_simple_model_says_whatever_happens(dsn: str) -> None:
    with asyncio.Runner() as runner:
        Machine.dsn, Machine.runner = dsn, runner
        Machine.outbox = Outbox(schema=f"test_{uuid4().hex}")
        Machine.connection, Machine.writer = (runner.run(asyncpg.connect(dsn)) for _ in range(2))
        Machine.pools = [runner.run(_new_pool(dsn)) for _ in range(_SLOTS)]
        runner.run(Machine.outbox.migrate(Machine.connection))
        try:
            run_state_machine_as_test(Machine, settings=_SETTINGS)
        finally:
            for pool in Machine.pools:
                pool.terminate()
            runner.run(Machine.connection.execute(f'DROP SCHEMA "{Machine.outbox.schema}" CASCADE'))
            runner.run(Machine.connection.close())
            runner.run(Machine.writer.close())
    print(dict(Machine.steps))
    assert {"claimed fresh", "claimed due", "claimed a suspect", "delivered", "buried", "taken over"} <= set(
        Machine.steps
    )
