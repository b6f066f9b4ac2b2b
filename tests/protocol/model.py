"""The protocol of order="key" as a machine of small steps, one for each statement or transaction.

A step sees what is committed at its moment, as a statement under READ COMMITTED does. A relay that is frozen is one
whose steps are a long time in coming; that its lease runs out meanwhile is a step of its own, at any moment. So a
relay may wake up anywhere, long after it was declared dead, and go on under its old name: it rereads, settles and
claims, all of it fenced as in the code. It even dispatches then: that it looks at its clock before each dispatch does
not help one that is frozen right after it looked.

Time itself is left out: what waits for a due time may be due at any moment, and a look that finds nothing is no step.
What happens once a minute may happen at any moment too, but nobody may count on it: without it, all must go on as well.

In the model: late, prepared and lost commits of writers; the horizon; claims, settlements, lanes that are blocked and
parked; gains, handovers and leases; crashes of relays, and their suspects; COMMITs without an answer that come late,
or never; rereading at any time; how far a lane is claimed; crashes of the server.

A crash of the server ends all connections and open transactions. Relays go on with what they remember: they deliver and
settle what they have in hand, and reread before they claim again. It may also forget the last commits, one or many, but
none before one that was durable: those of writers and operators, gains, handovers, and settlements of which anything
fails or falls in behind. So it may forget claims, settlements of what was delivered, unparking, and that a relay was
declared dead or has taken a new name.

Not in the model: writers that commit without durability, and positions that a crash of the server has given out once
more; relays that start again because of one, or fail over to a standby that is behind; order="total", messages without
a key, on_failure "skip"; more than one lane in a slot, and more than two writers; writers that are passed over;
messages that wait and are claimed while fresh ones of their lane are in hand; a relay that has renamed itself while its
former delivery is under way, which gains nothing until that has ended; attempts that are counted when a suspect is
claimed; lanes that are parked behind more than one dead letter, or have messages waiting before it, as a crash of the
server may leave one that was redriven; sizes, batches of several lanes, free slots of which a relay takes more than one
at once, and how many are its fair share.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tests.protocol.explorer import Report, Step, explore
from tests.protocol.world import (
    NO_FAULTS,
    PREPARED,
    Faults,
    Flaw,
    Lane,
    Reader,
    Relay,
    Row,
    Slot,
    State,
    Transaction,
    Writer,
    listed,
    names_of,
    put,
    waits,
)

Steps = Iterator[Step[State]]


@dataclass(frozen=True, slots=True)
class Protocol:
    """The protocol in a small world.

    Args:
        faults: What may go wrong, and how often.
        keys: Which slot each position falls into.
        writers: How many messages each transaction writes; together as many as there are keys.
        relays: How many there are.
        tries: Failures after which a message is given up.
        limit: Messages in one read, and in one delivery.
        on_failure: Whether what follows one that was given up goes on, or is parked behind it.
        suspects: Whether what was claimed twice running by relays that died is tried alone.
        prepares: Whether writers may prepare their commits.
        prompt: Whether each writer does everything in one step, so that nobody commits late.
        strict: Also calls it disorder when a relay that was declared dead delivers what its heir has given up.
        flaws: What is wrong with it.
    """

    faults: Faults = NO_FAULTS
    keys: tuple[int, ...] = (0, 0)
    writers: tuple[int, ...] = (1, 1)
    relays: int = 2
    tries: int = 2
    limit: int = 3
    on_failure: Literal["block", "park"] = "block"
    suspects: bool = False
    prepares: bool = False
    prompt: bool = False
    strict: bool = False
    flaws: tuple[Flaw, ...] = ()

    def check(self, limit: int = 5_000_000) -> Report[State]:
        """Goes through everything that may happen in this world."""
        return explore(self.start(), self.steps, broken=self.broken, is_end=self.is_end, limit=limit)

    def start(self) -> State:
        """Returns the beginning: the first relay owns all slots, which is no loss as the relays are all alike."""
        slots = max(self.keys) + 1
        others = [Relay(name, (Lane(),) * slots) for name in range(2, self.relays + 1)]
        names = self.relays * (1 + self.faults.server_crashes) + self.faults.expiries + self.faults.crashes
        start = State(
            writers=(Writer(),) * len(self.writers),
            rows=(Row("free"),) * len(self.keys),
            slots=(Slot(owner=1, epoch=1),) * slots,
            relays=(Relay(1, (Lane(epoch=1),) * slots), *others),
            left=self.faults,
            named=self.relays,
            living=sum(1 << name for name in range(1, self.relays + 1)),
            claims=(0,) * (names + 1) if self.suspects else (),
        )
        return start._replace(saved=frozenset([start.database()])) if self.faults.server_crashes else start

    # --- what must hold ----------------------------------------------------------------------------------

    def broken(self, state: State) -> str:
        """Names the promise that is broken."""
        if any(row.place == "gone" and not state.was_delivered(n) for n, row in enumerate(state.rows, 1)):
            return "lost"
        if any(row.place == "dead" and not row.attempts for row in state.rows):
            return "dead, and never tried"
        return state.broken

    def is_end(self, state: State) -> bool:
        """Whether everything committed is delivered or dead, and nothing is held."""
        return (
            all(
                row.place in {"gone", "dead", "lost"}
                or (row.place == "parked" and state.rows[row.holder - 1].place == "dead")
                or (row.place == "free" and all(writer.phase == "ended" for writer in state.writers))
                for row in state.rows
            )
            and not any(relay.in_hand() for relay in state.relays)
            and not state.late
        )

    def _verdict(self, state: State, position: int) -> str:
        """Judges a delivery."""
        row, key = state.rows[position - 1], self.keys[position - 1]
        if row.place in {"taken", "lost"}:
            return "delivered, though it did not commit"
        if state.was_delivered(position):
            return "" if self._is_faulty(state) else "delivered again without a reason"
        higher = range(position + 1, len(state.rows) + 1)
        is_early = any(state.was_delivered(n) and self.keys[n - 1] == key for n in higher)
        return "out of order" if is_early and (self.strict or row.place != "dead") else ""

    def _is_faulty(self, state: State) -> bool:
        """Whether anything has happened yet that may leave a delivery unsettled."""
        return _unsettling(state.left) != _unsettling(self.faults)

    # --- what may happen ---------------------------------------------------------------------------------

    def steps(self, state: State) -> Steps:
        """Goes through what may happen next."""
        return self._with_crashes(state) if state.left.server_crashes else self._steps(state)

    def _with_crashes(self, state: State) -> Steps:
        """Keeps with each step the tables as a crash of the server may leave them.

        After a durable commit, which has left `saved` empty, that is as they are; after any other also as they were.
        """
        for step in self._steps(state):
            saved, now = step.state.saved, step.state.database()
            yield step if now in saved else step._replace(state=step.state._replace(saved=saved | {now}))
        yield from self._crash_server(state)

    def _crash_server(self, state: State) -> Steps:
        """Loses the last commits that were not durable, one or many, and all connections; relays keep their memory."""
        relays = tuple(relay._replace(reader=Reader(), adrift=True) for relay in state.relays)
        writers = tuple(Writer("ended") if writer.phase in {"open", "visible"} else writer for writer in state.writers)
        crashed = state._replace(relays=relays, writers=writers, late=None, saved=frozenset())
        crashed = crashed._replace(left=state.spend("server_crashes"))
        for then in state.saved:
            rows = tuple(_after_crash(*row, writers) for row in zip(state.rows, then.rows, strict=True))
            after = crashed._replace(rows=rows, slots=then.slots, living=then.living, claims=then.claims)
            if crashed.left.server_crashes:
                after = after._replace(saved=frozenset([after.database()]))
            is_same = then == state.database()
            lost = "" if is_same else ", and commits are lost"
            yield Step(f"the server crashes{lost}", after, is_fault=True)

    def _steps(self, state: State) -> Steps:
        for number in range(len(state.writers)):
            yield from self._write(state, number)
        for name in range(1, state.named + 1):
            yield from self._bury(state, name)
        if state.late:
            who, ended = f"the late commit of relay {state.late.name}", state._replace(late=None)
            yield Step(f"{who} comes", self._commit(ended, state.late))
            yield Step(f"{who} never comes", ended)
        yield from self._sweep(state)
        if state.left.redrives:
            yield from self._redrive(state)
        for number, relay in enumerate(state.relays):
            yield from self._relay(state, number, relay)

    # --- writers -----------------------------------------------------------------------------------------

    def _write(self, state: State, number: int) -> Steps:
        writer, who = state.writers[number], f"writer {'AB'[number]}"
        if self.prompt:
            yield from self._write_at_once(state, number)
        elif writer.phase == "before":
            yield Step(f"{who} takes the lock", _with_writer(state, number, writer._replace(phase="open")))
        elif writer.phase == "open" and writer.written < self.writers[number]:
            yield from self._insert(state, number)
        elif writer.phase in {"open", "prepared"}:
            yield from self._end(state, number)
        elif writer.phase == "visible":
            # Only after everybody can see it: ProcArrayEndTransaction comes before the locks are released.
            yield Step(f"{who} lets go of the lock", _with_writer(state, number, writer._replace(phase="ended")))

    def _write_at_once(self, state: State, number: int) -> Steps:
        """Writes and commits; of writers that are alike, the first goes first."""
        alike = [n for n, count in enumerate(self.writers[:number]) if count == self.writers[number]]
        if state.writers[number].phase == "before" and all(state.writers[n].phase == "ended" for n in alike):
            last, count = state.last_position(), self.writers[number]
            rows = (*state.rows[:last], *[Row("pending")] * count, *state.rows[last + count :])
            written = _with_writer(state, number, Writer("ended", count))
            yield Step(
                f"writer {'AB'[number]} writes {listed(tuple(range(last + 1, last + count + 1)))}",
                written._replace(rows=rows, saved=frozenset()),
            )

    def _insert(self, state: State, number: int) -> Steps:
        """Gives out the next position; a transaction may have had its xid long before, by other work."""
        writer, who, position = state.writers[number], f"writer {'AB'[number]}", state.last_position() + 1
        if Flaw.XID_HORIZON in self.flaws and not writer.xid:
            writer = writer._replace(xid=1 + max(other.xid for other in state.writers))
            yield Step(f"{who} gets xid {writer.xid}", _with_writer(state, number, writer))
        rows = put(state.rows, position - 1, Row("taken", number))
        written = _with_writer(state, number, writer._replace(written=writer.written + 1))
        yield Step(f"{who} takes position {position}", written._replace(rows=rows))

    def _end(self, state: State, number: int) -> Steps:
        writer, who = state.writers[number], f"writer {'AB'[number]}"

        def ended(row: Row) -> tuple[Row, ...]:
            return tuple(row if old.place == "taken" and old.holder == number else old for old in state.rows)

        # Who wrote it matters only to a reader that compares xids.
        visible = ended(Row("pending", number if Flaw.XID_HORIZON in self.flaws else 0))
        committed = _with_writer(state, number, writer._replace(phase="visible"))
        yield Step(f"{who} commits", committed._replace(rows=visible, saved=frozenset()))
        if state.left.rollbacks:
            lost = _with_writer(state, number, writer._replace(phase="ended"))
            lost = lost._replace(rows=ended(Row("lost")), left=state.spend("rollbacks"))
            yield Step(f"{who} rolls back", lost, is_fault=True)
        if self.prepares and writer.phase == "open":
            prepared = _with_writer(state, number, writer._replace(phase="prepared"))
            yield Step(f"{who} prepares its commit", prepared._replace(saved=frozenset()))

    # --- what becomes of relays --------------------------------------------------------------------------

    def _bury(self, state: State, name: int) -> Steps:
        """Somebody declares a relay dead, it does not matter who: its lease has run out, rightly or not.

        Deleting its row waits for every transaction that has locked it FOR KEY SHARE, so a late commit goes first.
        One that lives and owns nothing would just take another name: that is left out.
        """
        if not state.lives(name) or state.is_committing(name):
            return
        if all(relay.name != name for relay in state.relays):
            yield Step(f"relay {name} is declared dead", self._buried(state, name))
        elif state.left.expiries and _owns(state, name):
            buried = self._buried(state, name)._replace(left=state.spend("expiries"))
            yield Step(f"relay {name} is frozen for long and declared dead", buried, is_fault=True)

    def _buried(self, state: State, name: int) -> State:
        rows, slots = list(state.rows), list(state.slots)
        if Flaw.BURY_KEEPS_WAITING not in self.flaws:
            rows = [_suspect(row) if waits(row) and row.holder == name else row for row in rows]
        for number, slot in enumerate(slots):
            if slot.owner == name:
                claimed = self._claimed(state, name, number)
                for position in claimed:
                    if position <= slot.suspect_upto:
                        rows[position - 1] = Row("waiting", 0, rows[position - 1].attempts)
                slots[number] = slot._replace(owner=0, suspect_upto=max(claimed, default=slot.suspect_upto))
        living = state.living & ~(1 << name)
        claims = put(state.claims, name, 0) if state.claims else ()
        return state._replace(rows=tuple(rows), slots=tuple(slots), living=living, claims=claims)

    def _sweep(self, state: State) -> Steps:
        """Somebody frees, at every start and once a minute, what is claimed by those that nobody has heard of."""
        for name in {row.holder for row in state.rows if waits(row) and row.holder and not state.lives(row.holder)}:
            rows = [_suspect(row) if waits(row) and row.holder == name else row for row in state.rows]
            yield Step(f"what relay {name} still claims is freed", state._replace(rows=tuple(rows)), is_fault=True)

    def _claimed(self, state: State, name: int, slot: int) -> list[int]:
        """Returns what a relay has claimed of the fresh messages of a slot, and not settled; if anybody asks."""
        if not state.claims:
            return []
        fresh = [position for position, row in self._of(state, slot) if row.place == "pending"]
        return [position for position in fresh if state.claims[name] >> position & 1]

    def _redrive(self, state: State) -> Steps:
        """An operator tries a dead letter once more: those that are parked behind it come along."""
        for head, letter in enumerate(state.rows, 1):
            if letter.place == "dead":
                rows = [
                    Row("behind") if n == head or (row.place == "parked" and row.holder == head) else row
                    for n, row in enumerate(state.rows, 1)
                ]
                redriven = state._replace(rows=tuple(rows), left=state.spend("redrives"), saved=frozenset())
                yield Step(f"somebody redrives {head}", redriven, is_fault=True)

    # --- a relay -----------------------------------------------------------------------------------------

    def _relay(self, state: State, number: int, relay: Relay) -> Steps:
        yield from self._end_of_relay(state, number, relay)
        yield from self._recollect(state, number, relay)
        # A dead one's reads reach nobody: they end at the claim, which finds no row.
        reads = state.lives(relay.name) or Flaw.UNFENCED_CLAIM in self.flaws
        if not relay.adrift and reads and any(lane.epoch for lane in relay.lanes):
            yield from self._read(state, number, relay)
        for slot in range(len(relay.lanes)):
            yield from self._lane(state, number, slot)

    def _end_of_relay(self, state: State, number: int, relay: Relay) -> Steps:
        """It is killed and comes back, or finds that it was declared dead: no memory, and a new name.

        It may be long before it finds that out, and what it settles and claims meanwhile is fenced off. One that is
        killed and owns nothing leaves nothing behind: that is left out.
        """
        alive = state.lives(relay.name)
        if alive and not (state.left.crashes and _owns(state, relay.name)):
            return
        name, known = state.named + 1, (Lane(),) * len(state.slots)
        if Flaw.REREAD_FOR_ANOTHER in self.flaws and not alive:
            known = tuple(Lane(lane.epoch) for lane in relay.lanes)
        fresh = state.with_relay(number, Relay(name, known))
        fresh = fresh._replace(named=name, living=state.living | 1 << name)
        if not alive:
            yield Step(f"relay {relay.name} finds that it was declared dead, and takes the name {name}", fresh)
        else:
            killed = fresh._replace(left=state.spend("crashes"))
            yield Step(f"relay {relay.name} is killed, and comes back as {name}", killed, is_fault=True)

    def _recollect(self, state: State, number: int, relay: Relay) -> Steps:
        """Rereads what it owns: after an unanswered COMMIT before anything else, and else once a minute, at any time.

        So does one that was declared dead, under its old name. A read and its claim are one transaction, and no place
        for it.
        """
        waits_for_own = state.is_committing(relay.name) and Flaw.REREAD_AT_ONCE not in self.flaws
        is_idle = not relay.adrift and not relay.in_hand() and not any(lane.epoch for lane in relay.lanes)
        if waits_for_own or is_idle or relay.reader.phase == "rows":
            return
        reread = self._reread(state, number)
        if reread != state:
            yield Step(f"relay {relay.name} rereads what it owns", reread, is_fault=not relay.adrift)

    def _reread(self, state: State, number: int) -> State:
        """Asks the tables for everything but what it has in hand, which it claims once more if it lives.

        It locks its own row for itself first, and so waits for any transaction of its that may still commit. Of a slot
        that is another's it keeps in hand what it has.
        """
        relay, alive = state.relays[number], state.lives(state.relays[number].name)
        waited = [position for lane in relay.lanes for position in lane.waited]
        holds_on = alive or Flaw.UNFENCED_REREAD in self.flaws

        def claimed(position: int, row: Row) -> Row:
            if not waits(row) or row.holder not in {0, relay.name}:
                return row
            if position in waited:
                return row._replace(holder=relay.name) if holds_on else row
            return row if Flaw.REREAD_KEEPS in self.flaws else row._replace(holder=0)

        state = state._replace(rows=tuple(claimed(n, row) for n, row in enumerate(state.rows, 1)))
        lanes = tuple(self._relearned(state, relay, n) for n in range(len(state.slots)))
        reread = state.with_relay(number, Relay(relay.name, lanes))
        if not state.claims or not alive:
            return reread
        return reread._replace(claims=put(state.claims, relay.name, sum(1 << n for n in relay.in_hand())))

    def _relearned(self, state: State, relay: Relay, slot: int) -> Lane:
        """Finds out what is blocked and parked, also by what is yet to be settled, which no table tells.

        What fresh messages are in hand of is not blocked by what waits: that came back, and is not before them.
        """
        lane, (owner, epoch, _) = relay.lanes[slot], state.slots[slot]
        blocked, parked = False, 0
        if Flaw.REREAD_TABLES_ONLY not in self.flaws:
            blocked = lane.failed == "again" or (bool(lane.aside) and not lane.parked)
            parked = lane.parked if lane.failed or lane.aside else 0
        if owner != relay.name:
            return lane._replace(epoch=0, draining=False, emptied=False, blocked=blocked, parked=parked)
        if Flaw.REREAD_BLOCKS in self.flaws:
            blocked |= any(waits(row) for _, row in self._of(state, slot))
        elif len(lane.waited) == len(lane.in_hand()):
            blocked |= self._is_blocked(state, slot, relay.name)
        return lane._replace(epoch=epoch, blocked=blocked, parked=self._parked(state, slot) or parked)

    def _is_blocked(self, state: State, slot: int, name: int) -> bool:
        """Whether anything waits that this relay has not in hand."""
        holders = {row.holder for _, row in self._of(state, slot) if waits(row)}
        return 0 in holders if Flaw.OTHERS_DO_NOT_BLOCK in self.flaws else not holders <= {name}

    def _parked(self, state: State, slot: int) -> int:
        """Returns the dead letter that a lane is parked behind, also if it is one no more."""
        if self.on_failure != "park":
            return 0
        heads = [n if row.place == "dead" else row.holder for n, row in self._of(state, slot) if _is_dead(row)]
        return max(heads, default=0)

    def _of(self, state: State, slot: int) -> Iterator[tuple[int, Row]]:
        return ((n, row) for n, row in enumerate(state.rows, 1) if self.keys[n - 1] == slot)

    # --- reading -----------------------------------------------------------------------------------------

    def _read(self, state: State, number: int, relay: Relay) -> Steps:
        is_bound = Flaw.BARE_CURSOR not in self.flaws and Flaw.XID_HORIZON not in self.flaws
        if relay.reader.phase != "rows" and is_bound:
            yield from self._raise_bound(state, number, relay)
        if relay.reader.phase == "idle":
            yield from self._select(state, number, relay, is_bound=is_bound)
        elif relay.reader.phase == "rows":
            yield from self._claim(state, number, relay)

    def _raise_bound(self, state: State, number: int, relay: Relay) -> Steps:
        """The last position, then who holds the lock; when those have let go, everything up to it can be seen."""
        reader, last, writers = relay.reader, state.last_position(), state.writing()
        who_writes, the_last = f"who holds the lock: {names_of(writers)}", f"the last position: {last}"
        rest = self._still(reader.writers, writers)
        if reader.phase == "idle" and last > relay.bound:
            if self.prompt:  # nobody would be waited for
                what, after = the_last, _bounded(relay, last, 0)
            elif Flaw.LOCKS_BEFORE_POSITION in self.flaws:
                what, after = who_writes, relay._replace(reader=Reader("locks", writers=writers))
            else:
                what, after = the_last, relay._replace(reader=Reader("last", last))
        elif reader.phase == "locks":
            what, after = the_last, _bounded(relay, last, reader.writers)
        elif reader.phase == "last":
            what, after = who_writes, _bounded(relay, reader.last, writers)
        elif reader.phase == "wait" and rest != reader.writers:
            what, after = f"who still holds the lock: {names_of(rest)}", _bounded(relay, reader.last, rest)
        else:
            return
        yield Step(f"relay {relay.name} reads {what}", state.with_relay(number, after))

    def _still(self, waited_for: int, writers: int) -> int:
        """A prepared transaction that appears when a regular one vanishes may be the same under another name."""
        rest, regular = waited_for & writers, (1 << PREPARED) - 1
        if waited_for & ~writers & regular and Flaw.PREPARED_IGNORED not in self.flaws:
            rest |= writers & ~regular
        return rest

    def _select(self, state: State, number: int, relay: Relay, *, is_bound: bool) -> Steps:
        """Finds what is pending beyond the cursor; without a bound the cursor moves to what was found last."""
        limit = relay.bound if is_bound else len(state.rows)
        beyond, in_hand = range(relay.cursor + 1, limit + 1), relay.in_hand()
        found = [n for n in beyond if self._is_found(state, relay, n) and n not in in_hand]
        rows = tuple(found[: self.limit])
        if rows:
            cursor = limit if is_bound and rows == tuple(found) else rows[-1]
            reading = relay._replace(reader=Reader("rows", cursor, rows=rows))
            yield Step(f"relay {relay.name} reads {listed(rows)}", state.with_relay(number, reading))
        elif is_bound and beyond:
            yield Step(f"relay {relay.name} reads nothing", state.with_relay(number, relay._replace(cursor=limit)))

    def _is_found(self, state: State, relay: Relay, position: int) -> bool:
        row, lane = state.rows[position - 1], relay.lanes[self.keys[position - 1]]
        if row.place != "pending" or not lane.epoch or lane.draining:
            return False
        if Flaw.XID_HORIZON not in self.flaws:
            return True
        running = [writer.xid for writer in state.writers if writer.phase == "open" and writer.xid]
        return state.writers[row.holder].xid < min(running, default=len(state.writers) + 1)

    def _claim(self, state: State, number: int, relay: Relay) -> Steps:
        """Notes the claim; what belongs to blocked and parked lanes is put aside instead of into a queue."""
        reader, lanes = relay.reader, list(relay.lanes)
        for position in reader.rows:
            lane = lanes[self.keys[position - 1]]
            if lane.blocked or lane.parked:
                lane = lane._replace(aside=(*lane.aside, position))
            elif lane.epoch:
                lane = lane._replace(queue=(*lane.queue, position))
            if not lane.draining:
                lanes[self.keys[position - 1]] = lane
        after = relay._replace(lanes=tuple(lanes), reader=Reader(), cursor=reader.last)
        commit = Transaction("claim", relay.name, rows=reader.rows)
        yield from self._transact(state, number, commit, after, f"claims {listed(reader.rows)}")

    # --- a lane ------------------------------------------------------------------------------------------

    def _lane(self, state: State, number: int, slot: int) -> Steps:
        relay = state.relays[number]
        lane = relay.lanes[slot]
        if lane.epoch or lane.in_hand():
            yield from self._deliver(state, number, slot)
        if relay.adrift:
            return
        if not lane.epoch:
            yield from self._gain(state, number, slot)
        elif not lane.draining:
            yield from self._unpark(state, number, slot)
            yield from self._take(state, number, slot)
            yield from self._unblock(state, number, slot)
        yield from self._hand_over(state, number, slot)

    def _gain(self, state: State, number: int, slot: int) -> Steps:
        """Takes a free slot, and reads in the same transaction which of its lanes are blocked and parked.

        No relay changes that before its own gain, so one step does for all its statements. Somebody's gain that may
        still commit has the slot locked, and others pass it over.
        """
        relay = state.relays[number]
        is_reading = relay.reader.phase == "rows" and Flaw.GAIN_DURING_READ not in self.flaws
        is_locked = state.late is not None and (state.late.kind, state.late.slot) == ("gain", slot)
        if state.slots[slot].owner or is_reading or is_locked:
            return
        blocked = self._is_blocked(state, slot, relay.name) and Flaw.GAIN_WITHOUT_BLOCKED not in self.flaws
        lane = Lane(state.slots[slot].epoch + 1, blocked=blocked, parked=self._parked(state, slot))
        cursor = relay.cursor if Flaw.GAIN_WITHOUT_REWIND in self.flaws else 0
        after = relay._replace(lanes=put(relay.lanes, slot, lane), cursor=cursor)
        yield from self._transact(state, number, Transaction("gain", relay.name, slot), after, f"gains slot {slot}")

    def _deliver(self, state: State, number: int, slot: int) -> Steps:
        relay = state.relays[number]
        lane = relay.lanes[slot]
        # What is settled again waits for the locks that the first time still has on the rows.
        is_locked = state.is_committing(relay.name) and state.late is not None and state.late.kind in _SETTLING
        if lane.accepted < len(lane.flight) and not lane.failed:
            yield from self._dispatch(state, number, slot, lane)
        elif lane.flight and not is_locked:
            yield from self._settle(state, number, slot)
        elif lane.queue and not lane.flight and not lane.draining:
            flight, queue = lane.queue[: self.limit], lane.queue[self.limit :]
            yield from self._dispatch(state, number, slot, lane._replace(flight=flight, queue=queue))
        if lane.aside and not is_locked:
            yield from self._move_behind(state, number, slot)

    def _dispatch(self, state: State, number: int, slot: int, lane: Lane) -> Steps:
        """The destination takes the next one of a batch, or refuses it and does not look at the rest."""
        relay, position = state.relays[number], lane.flight[lane.accepted]
        took = state.with_lane(number, slot, lane._replace(accepted=lane.accepted + 1))
        took = took._replace(broken=self._verdict(state, position), delivered=state.delivered | 1 << position)
        yield Step(f"relay {relay.name} delivers {position}", took)
        if state.left.failures:
            failed = state.with_lane(number, slot, self._refused(state, lane, position))
            failed = failed._replace(left=state.spend("failures"))
            yield Step(f"relay {relay.name} fails to deliver {position}", failed, is_fault=True)

    def _refused(self, state: State, lane: Lane, position: int) -> Lane:
        """Blocks or parks the lane at once: what is read from now on finds it so."""
        queue = () if lane.draining else lane.flight[lane.accepted + 1 :] + lane.queue
        lane = lane._replace(flight=lane.flight[: lane.accepted + 1])
        if lane.draining:
            lane = lane.with_what_is_in_hand()
        if state.rows[position - 1].attempts + 1 < self.tries:
            blocked = lane.blocked or Flaw.BLOCK_AFTER_SETTLE not in self.flaws
            lane = lane._replace(failed="again", blocked=blocked)
        elif self.on_failure == "park":
            lane = lane._replace(failed="given up", parked=position)
        else:
            return lane._replace(failed="given up", queue=queue)
        if Flaw.LEAVES_FOLLOWERS in self.flaws:
            return lane._replace(queue=queue)
        return lane._replace(queue=(), followers=queue)

    def _settle(self, state: State, number: int, slot: int) -> Steps:
        """One transaction of several statements, and one step.

        It holds its own row in outbox_relays FOR KEY SHARE from before it compares the slots until its commit, and
        who takes a slot away, bury or release, has to lock that row first. What it moves is in nobody else's hands.
        """
        relay = state.relays[number]
        lane = relay.lanes[slot]
        delivered, failed = lane.flight[: lane.accepted], lane.flight[lane.accepted] if lane.failed else 0
        again = lane.failed == "again"
        rest = lane._replace(flight=(), accepted=0, failed="", followers=(), blocked=lane.blocked or again)
        if Flaw.UNBLOCK_AFTER_HEAD in self.flaws and not failed:
            rest = rest._replace(blocked=False)
        after = relay._replace(lanes=put(relay.lanes, slot, rest.with_what_is_in_hand()))
        head = failed if failed and lane.parked == failed else 0
        commit = Transaction("settle", relay.name, slot, lane.epoch, delivered, failed, again, lane.followers, head)
        commit = self._holding_on(relay, commit)
        what = f"settles: {listed(delivered)} delivered" + (f", {failed} {lane.failed}" if failed else "")
        what += f", {listed(lane.followers)} behind" if lane.followers else ""
        yield from self._transact(state, number, commit, after, what)

    def _move_behind(self, state: State, number: int, slot: int) -> Steps:
        """What was read of a blocked lane joins those that wait: never before the one it waits for.

        Else the relay may die in between, and leave the followers waiting while their head is a fresh message.
        """
        relay = state.relays[number]
        lane = relay.lanes[slot]
        if lane.failed and Flaw.MOVE_BEFORE_HEAD not in self.flaws:
            return
        after = relay._replace(lanes=put(relay.lanes, slot, lane._replace(aside=()).with_what_is_in_hand()))
        commit = Transaction("behind", relay.name, slot, lane.epoch, followers=lane.aside, head=lane.parked)
        commit = self._holding_on(relay, commit)
        yield from self._transact(state, number, commit, after, f"moves {listed(lane.aside)} behind")

    def _holding_on(self, relay: Relay, commit: Transaction) -> Transaction:
        """In doubt, it first claims once more what it has in hand of what waits: the server may have forgotten that."""
        if not relay.adrift or Flaw.SETTLE_FORGOTTEN in self.flaws:
            return commit
        return commit._replace(held=tuple(position for lane in relay.lanes for position in lane.waited))

    def _take(self, state: State, number: int, slot: int) -> Steps:
        """Claims the first of a lane alone if it failed or is a suspect, else as many as follow up to the next such."""
        relay = state.relays[number]
        lane = relay.lanes[slot]
        waiting = [(n, row) for n, row in self._of(state, slot) if waits(row)]
        if Flaw.DUE_BY_TIME in self.flaws:
            waiting.sort(key=lambda one: (one[1].place == "behind", one[0] if one[1].place == "behind" else -one[0]))
        # Of a parked lane, what was redriven waits for the rest, which is still to be unparked.
        # What comes back after a crash of the server was due when it was claimed.
        came_back = state.left.server_crashes != self.faults.server_crashes
        is_due = any((row.place == "waiting" or came_back) and not row.holder for _, row in waiting)
        is_ready = (lane.blocked or is_due) and not lane.parked
        if Flaw.TAKE_WHILE_PARKED in self.flaws:
            is_ready = lane.blocked or bool(lane.parked)
        # What is moved behind once more, after an unanswered COMMIT, must not be in hand as a waiting message by then.
        is_moving = lane.aside and Flaw.TAKE_BEFORE_SETTLED not in self.flaws
        if not is_ready or is_moving or lane.flight or lane.queue or not waiting or waiting[0][1].holder:
            return
        count = 1
        if waiting[0][1].place == "behind":
            count = next(
                (n for n, (_, row) in enumerate(waiting) if row != Row("behind", 0, row.attempts)), len(waiting)
            )
        upto = self._read_so_far(relay)
        rows = tuple(position for position, _ in waiting[:count][: self.limit] if position <= upto)
        if not rows:
            return
        taken = lane._replace(queue=rows, waited=rows, blocked=True)
        after = relay._replace(lanes=put(relay.lanes, slot, taken))
        commit = Transaction("take", relay.name, slot, lane.epoch, rows)
        yield from self._transact(state, number, commit, after, f"claims {listed(rows)}, which waited")

    def _read_so_far(self, relay: Relay) -> int:
        """Returns how far waiting messages are claimed: fresh ones below were read, fell in behind and were settled."""
        if Flaw.TAKE_UNREAD in self.flaws or relay.cursor >= relay.bound > 0:
            return len(self.keys)
        return relay.cursor

    def _unblock(self, state: State, number: int, slot: int) -> Steps:
        """Nothing is left but what is in hand, and nothing is on its way there: a failure, or what was read.

        A failure between the answer of the database and what is made of it has to take that back: one step, therefore.
        """
        relay = state.relays[number]
        lane = relay.lanes[slot]
        is_moving = lane.failed == "again" or (lane.aside and Flaw.UNBLOCK_DURING_MOVE not in self.flaws)
        left = self._is_blocked(state, slot, relay.name)
        if lane.blocked and not left and not is_moving:
            if Flaw.UNBLOCK_LATE in self.flaws and not lane.emptied:
                what = f"relay {relay.name} finds nothing left that waits"
                yield Step(what, state.with_lane(number, slot, lane._replace(emptied=True)))
            else:
                what = f"relay {relay.name} finds nothing left that waits, unblocks the lane"
                yield Step(what, state.with_lane(number, slot, lane._replace(blocked=False)))
        if lane.emptied:
            what = f"relay {relay.name} unblocks the lane"
            yield Step(what, state.with_lane(number, slot, lane._replace(blocked=False, emptied=False)))

    def _unpark(self, state: State, number: int, slot: int) -> Steps:
        """Has those wait again who were parked behind a dead letter that is one no more."""
        relay = state.relays[number]
        lane = relay.lanes[slot]
        is_moving = lane.failed or lane.aside
        if lane.parked and state.rows[lane.parked - 1].place != "dead" and not is_moving:
            after = relay._replace(lanes=put(relay.lanes, slot, lane._replace(blocked=True, parked=0)))
            commit = Transaction("unpark", relay.name, slot, lane.epoch, head=lane.parked)
            yield from self._transact(state, number, commit, after, f"unparks what stands behind {lane.parked}")

    def _hand_over(self, state: State, number: int, slot: int) -> Steps:
        """Stops, drops what is queued, and gives the slot away when what is under way has been settled."""
        relay = state.relays[number]
        lane = relay.lanes[slot]
        if lane.epoch and not lane.draining and state.left.handovers:
            rest = lane._replace(draining=True, queue=(), aside=()).with_what_is_in_hand()
            draining = state.with_lane(number, slot, rest)
            what = f"relay {relay.name} is to hand over slot {slot}"
            yield Step(what, draining._replace(left=state.spend("handovers")), is_fault=True)
        is_busy = lane.flight and Flaw.NO_DRAINING not in self.flaws
        if lane.draining and not is_busy and relay.reader.phase != "rows" and not state.is_committing(relay.name):
            # Without draining the delivery goes on; its settling will find that the slot is another's.
            rest = lane if lane.flight else Lane()
            after = relay._replace(lanes=put(relay.lanes, slot, rest))
            commit = Transaction("release", relay.name, slot, lane.epoch)
            yield from self._transact(state, number, commit, after, f"gives slot {slot} away")

    # --- transactions ------------------------------------------------------------------------------------

    def _transact(self, state: State, number: int, commit: Transaction, after: Relay, what: str) -> Steps:
        """A transaction that commits; or whose COMMIT is not answered, so that it may come now, later or never."""
        what, alive = f"relay {commit.name} {what}", state.lives(commit.name)
        if self._is_allowed(state, state.relays[number], commit):
            yield Step(what, self._commit(state, commit).with_relay(number, after))
            if alive and state.left.unanswered and not state.late:
                yield Step(
                    f"{what}: no answer to the COMMIT", self._adrift(state, number, commit, after), is_fault=True
                )
        elif alive and commit.kind in _SETTLING:
            stale = state.with_lane(number, commit.slot, Lane())
            yield Step(f"relay {commit.name} settles nothing: slot {commit.slot} is another's", stale)

    def _adrift(self, state: State, number: int, commit: Transaction, after: Relay) -> State:
        """It holds what it held, settles again what it cannot know to be settled, and claims nothing meanwhile."""
        relay = after if commit.kind == "release" else state.relays[number]
        adrift = state.with_relay(number, relay._replace(reader=Reader(), adrift=True))
        return adrift._replace(left=state.spend("unanswered"), late=commit)

    def _is_allowed(self, state: State, relay: Relay, commit: Transaction) -> bool:
        """The fence: its own row is there and, to settle, all slots that it believes in are its own in that epoch."""
        alive, (owner, epoch, _) = state.lives(commit.name), state.slots[commit.slot]
        match commit.kind:
            case "settle" | "behind":
                known = [n for n, lane in enumerate(relay.lanes) if lane.epoch]
                owned = all(state.slots[n][:2] == (commit.name, relay.lanes[n].epoch) for n in known)
                if Flaw.SETTLE_WITHOUT_SLOTS in self.flaws and not known:
                    return True
                return Flaw.UNFENCED_SETTLE in self.flaws or (alive and owned)
            case "release":
                return alive and (owner, epoch) == (commit.name, commit.epoch)
            case "claim":
                return alive or Flaw.UNFENCED_CLAIM in self.flaws
            case "take":
                return alive or Flaw.UNFENCED_TAKE in self.flaws
            case "gain" | "unpark":
                return alive

    def _commit(self, state: State, commit: Transaction) -> State:
        if self._is_durable(commit):
            state = state._replace(saved=frozenset())
        slot, rows = state.slots[commit.slot], state.rows
        match commit.kind:
            case "gain":
                gained = slot._replace(owner=commit.name, epoch=slot.epoch + 1)
                return state._replace(slots=put(state.slots, commit.slot, gained))
            case "release":
                slots = put(state.slots, commit.slot, slot._replace(owner=0))
                return state._replace(slots=slots, rows=self._released(state, commit))
            case "take":
                rows = tuple(
                    row._replace(holder=commit.name) if n in commit.rows else row for n, row in enumerate(rows, 1)
                )
                return state._replace(rows=rows)
            case "unpark":
                rows = tuple(Row("behind") if row[:2] == ("parked", commit.head) else row for row in rows)
                return state._replace(rows=rows)
            case "claim":
                return state.with_claim(commit.name, commit.rows, claimed=True)
            case "settle" | "behind":
                return self._settled(state, commit)

    def _is_durable(self, commit: Transaction) -> bool:
        """Whether a crash of the server cannot have it forgotten; with it, all commits before it."""
        if commit.kind in _SETTLING:
            return bool(commit.failed or commit.followers) and Flaw.SETTLE_NOT_DURABLE not in self.flaws
        if commit.kind == "gain":
            return Flaw.GAIN_NOT_DURABLE not in self.flaws
        return commit.kind == "release" and Flaw.RELEASE_NOT_DURABLE not in self.flaws

    def _released(self, state: State, commit: Transaction) -> tuple[Row, ...]:
        if Flaw.RELEASE_KEEPS in self.flaws:
            return state.rows
        return tuple(
            row._replace(holder=0) if waits(row) and row.holder == commit.name and key == commit.slot else row
            for row, key in zip(state.rows, self.keys, strict=True)
        )

    def _settled(self, state: State, commit: Transaction) -> State:
        """Deletes what was delivered, moves what failed; but only what is still where the relay got it from."""
        rows, broken = _held_on(state, commit), ""
        moved = (*commit.rows, *([commit.failed] if commit.failed else []), *commit.followers)
        for position in moved:
            row = rows[position - 1]
            # What was delivered is not to be delivered again, whoever has claimed it since.
            if row.place == "pending" or (waits(row) and (row.holder == commit.name or position in commit.rows)):
                rows[position - 1] = _outcome(row, position, commit)
        if commit.head and commit.kind == "settle":
            for position, row in self._of(state, commit.slot):
                if waits(row) and not row.holder and position > commit.head:
                    rows[position - 1] = Row("parked", commit.head, row.attempts)
        is_dead = commit.failed and rows[commit.failed - 1].place == "dead"
        if is_dead and state.was_delivered(commit.failed) and not self._is_faulty(state):
            broken = "dead, though a living relay delivered it"
        settled = state._replace(rows=tuple(rows), broken=broken)
        return settled.with_claim(commit.name, moved, claimed=False)


_SETTLING = {"settle", "behind"}


def _held_on(state: State, commit: Transaction) -> list[Row]:
    """Claims once more, if the relay lives, what it has in hand of what waits."""
    if not commit.held or not state.lives(commit.name):
        return list(state.rows)
    return [
        row._replace(holder=commit.name) if position in commit.held and waits(row) and not row.holder else row
        for position, row in enumerate(state.rows, 1)
    ]


def _outcome(row: Row, position: int, commit: Transaction) -> Row:
    if position in commit.rows:
        return Row("gone")
    if position in commit.followers:
        return Row("parked", commit.head, row.attempts) if commit.head else Row("behind", 0, row.attempts)
    return Row("waiting" if commit.again else "dead", 0, row.attempts + 1)


def _after_crash(now: Row, then: Row, writers: tuple[Writer, ...]) -> Row:
    """A position that was given out is not given out again; only a transaction that was prepared goes on."""
    if now.place == "taken" and writers[now.holder].phase == "ended":
        return Row("lost")
    return now if now.place in {"taken", "lost"} else then


def _suspect(row: Row) -> Row:
    """Frees what a dead relay has claimed; it may have died of it, so it is tried alone."""
    return Row("waiting", 0, row.attempts)


def _is_dead(row: Row) -> bool:
    return row.place in {"dead", "parked"}


def _unsettling(faults: Faults) -> tuple[int, ...]:
    return faults.expiries, faults.crashes, faults.unanswered, faults.server_crashes


def _owns(state: State, name: int) -> bool:
    return any(slot.owner == name for slot in state.slots)


def _with_writer(state: State, number: int, writer: Writer) -> State:
    return state._replace(writers=put(state.writers, number, writer))


def _bounded(relay: Relay, last: int, writers: int) -> Relay:
    """Waits for writers; when there are none, everything up to the last position is there to be seen."""
    if writers:
        return relay._replace(reader=Reader("wait", last, writers))
    return relay._replace(reader=Reader(), bound=last)
