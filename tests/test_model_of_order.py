# ruff: noqa: S608 -- the tables are our own, and the ids of messages parameters
"""As `test_model`, where the messages of a key keep their order: what a relay claims, and what becomes of those behind.

What a relay claims of the waiting messages is its own choice, but there is no choice of another order: nothing is
claimed while one that is before it is pending and not claimed with it.
"""

import asyncio
from collections import Counter, defaultdict
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
    NoWaiting,
    Outbox,
    OutboxDispatcher,
    OutboxError,
    PartialDispatchError,
    RejectedError,
)
from tests.test_model import LONG, Batch, Paused, Run, backoff, decide

_SETTINGS = settings(
    max_examples=2_500 if LONG else 20,
    stateful_step_count=80 if LONG else 40,
    derandomize=not LONG,
    deadline=None,
    print_blob=True,
    phases=[Phase.generate],  # shrinking takes longer than the time limit, and the steps are few
    suppress_health_check=list(HealthCheck),
)
_HOUR = timedelta(hours=1)
_RELAYS = 2
_KEYS = st.lists(st.sampled_from(["a", "a", "a", "b", "b", None]), min_size=1, max_size=4)
_KINDS = ["accepted", "accepted", "accepted", "error", "error", "error", "rejected", "rejected", "unavailable"]
_ERRORS = {"error": ValueError, "rejected": RejectedError, "unavailable": DestinationUnavailableError}
_WHICH = st.integers(0, 5)
_SUBSET = st.integers(0, 15)


@dataclass
class _Known:
    """What the model knows of a message that is in one of the tables."""

    state: str
    """fresh, waiting, dead or dispatched."""
    position: int = 0
    lane: str | None = None
    """The key, of those that keep a place in its order."""
    due: str = "now"
    """now, later, or behind the first of its lane."""
    attempts: int = 0
    suspect: str | None = None
    holder: UUID | None = None
    behind: int | None = None


@dataclass(eq=False)
class _Run(Run):
    held: set[UUID] = field(default_factory=set)
    open: set[UUID] = field(default_factory=set)
    """Those in its hands of which nothing is known yet."""
    accepted: list[UUID] = field(default_factory=list)
    failures: list[tuple[Batch, list[UUID], str, bool]] = field(default_factory=list)
    """In the order of the calls: the batch, who failed, how, and whether one of them may be to blame alone."""
    back: set[UUID] = field(default_factory=set)
    """Those that the destination was not there for."""


class _Machine(RuleBasedStateMachine):
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
        self.known: dict[UUID, _Known] = {}
        self.relays: dict[UUID, bool] = {}
        """Those registered, and whether their lease has run out."""
        self.runs: list[_Run | None] = [None] * _RELAYS
        self.owner: UUID | None = None
        """Who owns the slots, all of them."""
        self.refused: set[UUID] = set()
        """Those for whom another relay did not get to work."""
        self.suspect_upto = 0
        self.unseen: dict[UUID, str | None] | None = None
        """What was written in a transaction that is still open."""
        self.table = f'"{self.outbox.schema}"."{self.outbox.table}'

    def do(self, work: Any) -> Any:
        return self.runner.run(work)

    def _count(self, state: str) -> int:
        return sum(known.state == state for known in self.known.values())

    def tick(self, what: str) -> None:
        self.steps[what] += 1

    @initialize(
        commit=st.sampled_from(CommitStrategy),
        size=st.integers(1, 4),
        on_failure=st.sampled_from(["block", "park", "skip"]),
    )
    def begin(self, commit: CommitStrategy, size: int, on_failure: str) -> None:
        self.commit, self.size, self.on_failure = commit, size, on_failure
        self.do(self.outbox.clear(self.connection))
        self.do(self.connection.execute(f'DELETE FROM {self.table}_relays"'))
        self.do(self.connection.execute(f'UPDATE {self.table}_slots" SET owner = NULL, suspect_upto = 0'))
        self.write(["a", "b", "a", None, "a", "b"])

    def teardown(self) -> None:
        self.do(self._teardown())

    async def _teardown(self) -> None:
        for slot, run in enumerate(self.runs):
            if run:
                await self._die(slot, run)
        if self.unseen is not None:
            await self.writer.execute("ROLLBACK")

    # --- writing

    @precondition(lambda self: self._count("fresh") < 3 * self.size)
    @rule(keys=_KEYS)
    def write(self, keys: list[str | None]) -> None:
        self.do(self._write(self.connection, [Message(0, topic="t", key=key) for key in keys]))
        self.do(self._learn())

    @precondition(lambda self: not any(known.due == "later" and not known.attempts for known in self.known.values()))
    @rule(keys=_KEYS, later=st.booleans())
    def write_delayed(self, keys: list[str | None], *, later: bool) -> None:
        """They have no place in the order."""
        due = datetime.now(UTC) + (_HOUR if later else -_HOUR)
        messages = [Message(0, topic="t", key=key, due_at=due) for key in keys]
        self.do(self._write(self.connection, messages))
        for message in messages:
            self.known[message.id] = _Known("waiting", due="later" if later else "now")
        self.do(self._learn())

    async def _write(self, connection: asyncpg.Connection, messages: list[Message]) -> None:
        async with connection.transaction():
            await OutboxDispatcher(connection, self.outbox).dispatch(*messages)

    @precondition(lambda self: self.unseen is None and self._count("fresh") < 3 * self.size)
    @rule(keys=_KEYS)
    def begin_a_transaction(self, keys: list[str | None]) -> None:
        messages = [Message(0, topic="t", key=key) for key in keys]
        self.do(self.writer.execute("BEGIN"))
        self.do(OutboxDispatcher(self.writer, self.outbox).dispatch(*messages))
        self.unseen = {message.id: message.key for message in messages}

    @precondition(lambda self: self.unseen is not None)
    @rule(regret=st.booleans())
    def end_the_transaction(self, *, regret: bool) -> None:
        self.do(self.writer.execute("ROLLBACK" if regret else "COMMIT"))
        self.unseen = None
        self.do(self._learn())

    async def _learn(self) -> None:
        """Positions are given by the table, and what is new there is fresh."""
        for message in await self.outbox.retrieve(self.connection, 10_000):
            known = self.known.setdefault(message.id, _Known("fresh", lane=message.key))
            known.position = message.position or 0

    # --- claiming

    @precondition(lambda self: self._is_there_work())
    @rule()
    def claim(self) -> None:
        self.do(self._claim(self.runs.index(None)))

    @precondition(lambda self: self._is_there_work() and self.owner is None)
    @rule(answers=st.lists(st.tuples(st.sampled_from(_KINDS), st.none() | _SUBSET), min_size=1, max_size=3))
    def deliver(self, answers: list[tuple[str, int | None]]) -> None:
        """One `run_once` from its beginning to its end."""
        slot = self.runs.index(None)
        self.do(self._claim(slot))
        run, number = self.runs[slot], 0
        while run and self.runs[slot] is run:
            self.do(self._answer(slot, run, *answers[number % len(answers)]))
            number += 1

    def _is_there_work(self) -> bool:
        if None not in self.runs or (self.owner in self.refused and not self.relays[self.owner]):
            return False
        heads = [names[0] for names in self._lanes().values() if self.unseen is None]
        ready = [name for name, known in self.known.items() if known.state == "waiting" and known.lane is None] + heads
        is_any_due = any(self.known[name].due != "later" for name in ready) or bool(self._next_fresh())
        return is_any_due or any(self.relays.values())

    async def _claim(self, slot: int) -> None:
        self._take_over()
        run = _Run(self.pools[slot])
        may_work = self.owner is None
        if not may_work:
            assert self.owner
            self.refused.add(self.owner)  # once is enough
        else:
            self._park()
            self._wake_heads()
            self._unpark()
        fresh = set(self._next_fresh()) if may_work else set()
        buried = await self._dead()
        run.begin(
            self.outbox,
            self.size,
            self.commit,
            order="key",
            on_failure=self.on_failure,
            destination_backoff=NoWaiting(max_tries=-1),
        )
        called = await run.is_called()
        assert may_work or not called, "two relays at once"
        if called:
            await self._learn_what_it_holds(run)
        else:
            run.held = fresh or await self._dead() - buried  # at most one suspect, given up without being tried
        assert not fresh or run.held == fresh, "fresh ones first, the lowest of them"
        if may_work and not fresh:
            self._check_what_was_claimed(run.held)
        run.open = set(run.held)
        for name in run.held:
            known = self.known[name]
            known.holder, known.due = run.owner, "now"
            known.attempts += known.suspect == "crash"
        self.runs[slot] = run
        self.tick("claimed fresh" if fresh else "claimed waiting" if run.held else "claimed nothing")
        await self._go_on(slot, run, called=called)

    async def _learn_what_it_holds(self, run: _Run) -> None:
        registered = await self.connection.fetch(f'SELECT owner FROM {self.table}_relays"')
        (run.owner,) = {row["owner"] for row in registered} - set(self.relays)
        self.relays[run.owner] = False
        self.owner = run.owner
        run.held = await self._held_by(run.owner)

    def _next_fresh(self) -> list[UUID]:
        """None, as long as a writer may still commit below them."""
        if self.unseen is not None:
            return []
        fresh = [name for name, known in self.known.items() if known.state == "fresh"]
        return sorted(fresh, key=lambda name: self.known[name].position)[: self.size]

    def _check_what_was_claimed(self, held: set[UUID]) -> None:
        """Each is due or behind one that is, and nobody in between is left out."""
        heads = {lane: names[0] for lane, names in self._lanes().items()}
        assert sum(self.known[name].suspect == "crash" for name in held) <= 1
        for lane, names in self._lanes().items():
            mine = [name for name in names if name in held]
            assert mine == names[: len(mine)], f"{lane} out of order"
            if len(mine) > 1:
                assert not any(self.known[name].attempts or self.known[name].suspect for name in mine), "in trouble"
        ready = {
            name
            for name, known in self.known.items()
            if known.state == "waiting" and known.due == "now" and (not known.lane or heads[known.lane] == name)
        }
        if self.unseen is not None:  # a writer may still commit below what waits in order
            ready = {name for name in ready if not self.known[name].lane}
        assert all(self.known[name].due != "later" for name in held)
        assert {name for name in held if not self.known[name].lane or heads[self.known[name].lane] == name} <= ready  # type: ignore[index]
        assert bool(held) == bool(ready), "work was left"

    def _lanes(self) -> dict[str, list[UUID]]:
        """Those that wait in order, by lane."""
        lanes = defaultdict(list)
        for name, known in sorted(self.known.items(), key=lambda item: item[1].position):
            if known.state == "waiting" and known.lane:
                lanes[known.lane].append(name)
        return lanes

    def _wake_heads(self) -> None:
        for names in self._lanes().values():
            if self.known[names[0]].due == "behind":
                self.known[names[0]].due = "now"

    def _unpark(self) -> None:
        """Those go on who were parked behind one that was discarded."""
        dead = {known.position for known in self.known.values() if known.state == "dead"}
        for name, known in self.known.items():
            if known.state == "dead" and known.behind is not None and known.behind not in dead:
                self.known[name] = _Known("waiting", known.position, known.lane)
                self.tick("unparked")

    # --- answering

    async def _go_on(self, slot: int, run: _Run, *, called: bool) -> None:
        """Checks the call; or that the run has ended, and notes what it settled."""
        while called and self.owner != run.owner:  # in truth its lease would not let it go on
            run.answers.put_nowait(Paused())
            called = await run.is_called()
        if called:
            self._check_the_call(run)
            return
        assert await run.task == len(run.accepted)
        if run.owner is None or self.owner == run.owner:
            self._settle(run)
        else:
            self.tick("a stale settle")
        self.relays.pop(run.owner, None)  # type: ignore[arg-type]  # None if there was nothing to call
        if self.owner == run.owner:
            self.owner = None
        self.runs[slot] = None

    def _check_the_call(self, run: _Run) -> None:
        names = [message.id for message in run.call]
        assert set(names) <= run.open, "called twice, or not its own"
        assert len(names) <= self.size
        suspects = [self.known[name].suspect for name in names]
        assert len(names) == 1 or not any(suspects), "a suspect had company"
        for place, name in enumerate(names):
            known = self.known[name]
            earlier = {
                other
                for other in run.open - set(names[:place])
                if known.lane and self.known[other].lane == known.lane and self.known[other].position < known.position
            }
            assert not earlier, "one was overtaken"

    @precondition(lambda self: any(self.runs))
    @rule(which=_WHICH, kind=st.sampled_from(_KINDS), subset=st.none() | _SUBSET)
    def answer(self, which: int, kind: str, subset: int | None) -> None:
        """Accepts the call, raises for all of it, or names a subset."""
        slot, run = self._one_of_the_runs(which)
        self.do(self._answer(slot, run, kind, subset))

    @precondition(lambda self: any(self.runs))
    @rule(which=_WHICH, kind=st.sampled_from(_KINDS))
    def answer_to_the_end(self, which: int, kind: str) -> None:
        slot, run = self._one_of_the_runs(which)
        while self.runs[slot] is run:
            self.do(self._answer(slot, run, kind, None))

    def _one_of_the_runs(self, which: int) -> tuple[int, _Run]:
        runs = [(slot, run) for slot, run in enumerate(self.runs) if run]
        return runs[which % len(runs)]

    async def _answer(self, slot: int, run: _Run, kind: str, subset: int | None) -> None:
        positions = {message.id: message.position or 0 for message in run.call}
        names = list(positions)
        failed = set() if kind == "accepted" else set(names)
        if subset is not None:
            failed = {name for n, name in enumerate(names) if name in failed and subset >> n & 1}
        error: BaseException | None = None if kind == "accepted" else _ERRORS[kind](kind)
        shared = subset is None and len(names) > 1
        if error and subset is not None:
            shared = subset % 2 == 0 and len(failed) > 1  # one error for several, or to each its own
            error = PartialDispatchError({name: error if shared else _ERRORS[kind](kind) for name in failed})
        batch = Batch(names, self.known[names[0]].suspect if self.owner == run.owner else None)
        run.accepted += [name for name in names if name not in failed]
        run.open -= set(names)
        if kind == "unavailable":
            run.back |= failed
        else:
            run.failures.append((batch, sorted(failed, key=positions.__getitem__), kind, shared))
        run.answers.put_nowait(error)
        await self._go_on(slot, run, called=await run.is_called())

    # --- what is settled in the end

    def _settle(self, run: _Run) -> None:
        for name in run.accepted:
            self._delivered(name)
        for batch, names, kind, shared in run.failures:
            heads: set[str] = set()
            for name in names:
                self._fails(batch, name, kind, shared=shared, heads=heads)
        self._settle_the_rest(run)
        self._park()

    def _fails(self, batch: Batch, name: UUID, kind: str, *, shared: bool, heads: set[str]) -> None:
        known, before = self.known[name], self.known[name].attempts
        outcome = decide(batch, name, before, kind, shared=shared)
        known.state, known.holder = outcome.state or "", None
        known.attempts, known.suspect = outcome.attempts, outcome.suspect
        known.due = "now" if outcome.due else "later"
        if self.on_failure == "skip":
            known.lane = None
            self.tick("skipped")
        if known.lane and (head := self._parked_behind(known)):
            known.state, known.behind, known.due, known.suspect = "dead", head, "now", None
            self.tick("parked")
        elif outcome.state == "dead":
            known.behind = known.position if known.lane and self.on_failure == "park" else None
            self.tick("buried")
        elif known.lane in heads:  # no attempt of its own: with a head before it, it could not but fail
            known.due, known.attempts, known.suspect = "behind", before, None
        elif known.lane:
            heads.add(known.lane)
            self.tick("blocked")

    def _parked_behind(self, known: _Known) -> int | None:
        """The dead letter that parks a message: the last before it."""
        if self.on_failure == "block" and not any(one.behind for one in self.known.values()):
            return None
        heads = [
            one.behind
            for one in self.known.values()
            if one.state == "dead" and one.lane == known.lane and one.behind is not None
        ]
        return max((head for head in heads if head < known.position), default=None)

    def _settle_the_rest(self, run: _Run) -> None:
        for name in run.back:
            self._give_back(name)
        for name in sorted(run.open, key=lambda name: self.known[name].position):
            known = self.known[name]
            if known.suspect == "crash" and known.attempts > 1 and backoff(known.attempts - 1, None) is None:
                known.state, known.attempts, known.suspect, known.holder = "dead", known.attempts - 1, None, None
                known.behind = known.position if known.lane and self.on_failure == "park" else None
                self.tick("gave up a suspect")
            elif known.lane and not self._is_held_up(run, known):
                known.attempts -= known.suspect == "crash"
                known.state, known.due, known.holder = "waiting", "behind", None
                if head := self._parked_behind(known):
                    known.state, known.behind, known.due, known.suspect = "dead", head, "now", None
                    self.tick("fell in behind a dead letter")
                self.tick("fell in")
            else:
                self._give_back(name)

    def _is_held_up(self, run: _Run, known: _Known) -> bool:
        """Whether it could not go out since the destination was not there for its lane."""
        return any(self.known[name].lane == known.lane for name in run.back)

    def _give_back(self, name: UUID) -> None:
        known = self.known[name]
        known.attempts -= known.suspect == "crash"
        known.holder = None
        self.tick("given back")

    def _park(self) -> None:
        """Those that wait behind one that was parked join it."""
        for known in self.known.values():
            if known.state == "waiting" and known.lane and self.on_failure == "park" and known.holder is None:
                head = self._parked_behind(known)
                if head:
                    known.state, known.behind, known.due, known.suspect = "dead", head, "now", None
                    self.tick("parked while it waited")

    def _delivered(self, name: UUID) -> None:
        self.tick("delivered")
        if self.commit is CommitStrategy.DELETE:
            del self.known[name]
        else:
            known = self.known[name]
            self.known[name] = _Known("dispatched", known.position, known.lane)

    # --- death

    @precondition(lambda self: any(self.runs))
    @rule(which=_WHICH, at_once=st.booleans())
    def die(self, which: int, *, at_once: bool) -> None:
        """And its lease ends, now or some time."""
        self.tick("died")
        slot, run = self._one_of_the_runs(which)
        self.do(self._die(slot, run))
        if at_once and run.owner in self.relays:
            self.lease_ends(list(self.relays).index(run.owner))

    async def _die(self, slot: int, run: _Run) -> None:
        """The process ends: all its connections are cut, and nobody settles anything."""
        run.pool.terminate()
        run.answers.put_nowait(Paused())
        while await run.is_called():
            run.answers.put_nowait(Paused())
        with pytest.raises(OutboxError):
            await run.task
        self.pools[slot] = await _new_pool(self.dsn)
        self.runs[slot] = None

    @precondition(lambda self: not all(self.relays.values()))
    @rule(which=_WHICH)
    def lease_ends(self, which: int) -> None:
        """Of one that died, or of one that goes on and does not know it."""
        owner = list(self.relays)[which % len(self.relays)]
        query = f'UPDATE {self.table}_relays" SET until = clock_timestamp() WHERE owner = $1'
        self.do(self.connection.execute(query, owner))
        self.relays[owner] = True

    def _take_over(self) -> None:
        """What the next relay does first of all: what was in the hands of two dead in a row is a suspect."""
        dead = {owner for owner, ended in self.relays.items() if ended}
        held = [known for known in self.known.values() if known.holder in dead]
        for known in held:
            known.holder = None
            if known.state == "waiting":
                known.suspect, known.due = "crash", "now"
        fresh = [known for known in held if known.state == "fresh"]
        for known in fresh:
            if known.position <= self.suspect_upto:
                known.state, known.suspect = "waiting", "crash"
                known.due = "behind" if known.lane else "now"
                self.tick("suspected")
        if fresh:
            self.suspect_upto = max(known.position for known in fresh)
        if self.owner in dead:
            self.owner = None
            self.tick("taken over")
        for owner in dead:
            del self.relays[owner]

    @precondition(lambda self: any(known.due == "later" for known in self.known.values()))
    @rule()
    def time_passes(self) -> None:
        query = f"""UPDATE {self.table}_waiting" SET due_at = due_at - interval '2 h'
            WHERE due_at > clock_timestamp() AND due_at < 'infinity'"""
        self.do(self.connection.execute(query))
        for known in self.known.values():
            known.due = "now" if known.due == "later" else known.due

    # --- the operator

    @precondition(lambda self: self._count("dead"))
    @rule(subset=st.none() | _SUBSET)
    def redrive(self, subset: int | None) -> None:
        """Each takes those along that are parked with it."""
        names = self._some_dead(subset)
        heads = {self.known[name].behind or self.known[name].position for name in names}
        again = [
            name
            for name, known in self.known.items()
            if known.state == "dead" and not heads.isdisjoint({known.position, known.behind})
        ]
        assert self.do(self.outbox.redrive(self.connection, None if subset is None else names)) == len(again)
        for name in again:
            self.tick("redriven")
            self.known[name] = _Known("waiting", self.known[name].position, self.known[name].lane)

    @precondition(lambda self: self._count("dead"))
    @rule(subset=_SUBSET)
    def discard(self, subset: int) -> None:
        names = self._some_dead(subset)[:1]
        assert self.do(self.outbox.discard(self.connection, names)) == len(names)
        for name in names:
            del self.known[name]

    def _some_dead(self, subset: int | None) -> list[UUID]:
        dead = [name for name, known in self.known.items() if known.state == "dead"]
        return [name for n, name in enumerate(dead) if subset is None or subset >> (n % 4) & 1]

    # --- what must be, after each step

    @invariant()
    def the_tables_are_as_the_model_says(self) -> None:
        if hasattr(self, "commit"):
            self.do(self._compare())

    async def _compare(self) -> None:
        rows = await self.connection.fetch(f"""
            SELECT o.id, CASE WHEN dispatched_at IS NULL THEN 'fresh' ELSE 'dispatched' END AS state, o.position,
                'now' AS due, 0 AS attempts, NULL AS suspect, c.owner AS holder, NULL::bigint AS behind
            FROM {self.table}" o LEFT JOIN {self.table}_claims" c
                ON o.position = ANY(c.positions) AND dispatched_at IS NULL
            UNION ALL SELECT id, 'waiting', position, CASE WHEN due_at = 'infinity' THEN 'behind'
                WHEN due_at <= clock_timestamp() THEN 'now' ELSE 'later' END, attempts, suspect, owner, NULL
            FROM {self.table}_waiting"
            UNION ALL SELECT id, 'dead', position, 'now', attempts, NULL, NULL, behind FROM {self.table}_dead" """)
        there = {
            row["id"]: _Known(
                row["state"],
                row["position"],
                self.known[row["id"]].lane if row["id"] in self.known else "?",
                *list(row.values())[3:],
            )
            for row in rows
        }
        assert len(there) == len(rows), "a message is in one table only, and in one claim"
        assert there == self.known
        owners = await self.connection.fetch(f'SELECT DISTINCT owner FROM {self.table}_slots"')
        assert [row["owner"] for row in owners] == [self.owner]
        registered = await self.connection.fetch(f'SELECT owner FROM {self.table}_relays"')
        assert {row["owner"] for row in registered} == set(self.relays)

    # --- looking

    async def _held_by(self, owner: UUID) -> set[UUID]:
        query = f"""
            SELECT id FROM {self.table}_waiting" WHERE owner = $1 UNION ALL
            SELECT id FROM {self.table}" o JOIN {self.table}_claims" c ON position = ANY(positions) WHERE owner = $1"""
        return {row["id"] for row in await self.connection.fetch(query, owner)}

    async def _dead(self) -> set[UUID]:
        return {letter.message.id for letter in await self.outbox.dead_letters(self.connection, limit=10_000)}


async def _new_pool(dsn: str) -> asyncpg.Pool:
    return await asyncpg.create_pool(dsn, min_size=0, max_size=2)


@pytest.mark.timeout(3600 if LONG else 150)
@pytest.mark.filterwarnings("default::hypothesis.errors.NonInteractiveExampleWarning")
def test_where_an_order_is_kept_the_tables_are_what_a_simple_model_says_whatever_happens(dsn: str) -> None:
    with asyncio.Runner() as runner:
        _Machine.dsn, _Machine.runner = dsn, runner
        _Machine.outbox = Outbox(schema=f"test_{uuid4().hex}")
        _Machine.connection, _Machine.writer = (runner.run(asyncpg.connect(dsn)) for _ in range(2))
        _Machine.pools = [runner.run(_new_pool(dsn)) for _ in range(_RELAYS)]
        runner.run(_Machine.outbox.migrate(_Machine.connection))
        try:
            run_state_machine_as_test(_Machine, settings=_SETTINGS)
        finally:
            for pool in _Machine.pools:
                pool.terminate()
            runner.run(_Machine.connection.execute(f'DROP SCHEMA "{_Machine.outbox.schema}" CASCADE'))
            runner.run(_Machine.connection.close())
            runner.run(_Machine.writer.close())
    print(dict(_Machine.steps))
    assert {"claimed fresh", "claimed waiting", "delivered", "buried", "fell in", "taken over"} <= set(_Machine.steps)
