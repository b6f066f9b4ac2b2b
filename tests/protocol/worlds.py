"""The worlds that are gone through: small ones by the tests, large ones by hand, and one in which each flaw shows."""

from dataclasses import replace
from typing import Final

from tests.protocol.model import Protocol
from tests.protocol.world import NO_FAULTS, Faults, Flaw

THREE: Final = (0, 0, 0)
"""Three messages of one key; the first writer writes two of them, and any of the three may be the other's."""
TWO_AND_ONE: Final = (2, 1)

SMALL: Final = {
    "writers that prepare, roll back and commit late": Protocol(
        Faults(failures=1, rollbacks=1), keys=THREE, writers=TWO_AND_ONE, relays=1, prepares=True
    ),
    "failures, retries and a dead letter": Protocol(
        Faults(failures=4), keys=THREE, writers=TWO_AND_ONE, relays=1, prompt=True
    ),
    "one at a time": Protocol(Faults(crashes=1, failures=1), keys=THREE, writers=TWO_AND_ONE, limit=1, prompt=True),
    "a relay taken for dead": Protocol(Faults(expiries=1, failures=1), prompt=True),
    "a relay taken for dead, two keys": Protocol(Faults(expiries=1), keys=(0, 1), prompt=True),
    "a crash": Protocol(Faults(crashes=1, failures=1), keys=THREE, writers=TWO_AND_ONE, prompt=True),
    "suspects of two crashes": Protocol(Faults(crashes=2), suspects=True, prompt=True),
    "a handover": Protocol(Faults(handovers=1, failures=1), keys=THREE, writers=TWO_AND_ONE, prompt=True),
    "a COMMIT without an answer, a crash": Protocol(
        Faults(crashes=1, unanswered=1, failures=1), keys=THREE, writers=TWO_AND_ONE, relays=1, prompt=True
    ),
    "a handover without an answer": Protocol(Faults(unanswered=1, failures=1, handovers=1), prompt=True),
    "a parked lane": Protocol(
        Faults(failures=2, redrives=2),
        keys=THREE,
        writers=TWO_AND_ONE,
        tries=1,
        on_failure="park",
        strict=True,
        prompt=True,
    ),
    "a parked lane, and a relay taken for dead": Protocol(
        Faults(expiries=1, failures=1, redrives=1), tries=1, on_failure="park", strict=True, prompt=True
    ),
    "a crash of the server": Protocol(Faults(server_crashes=1, failures=2), prompt=True),
    "a crash of the server, a handover": Protocol(
        Faults(server_crashes=1, handovers=1, failures=1), writers=(2,), limit=1, prompt=True
    ),
}

LARGE: Final = {
    "a relay taken for dead, and late commits": Protocol(Faults(expiries=1, failures=1)),
    "a crash, and late commits": Protocol(Faults(crashes=1, failures=1), keys=THREE, writers=TWO_AND_ONE),
    "a handover, and late commits": Protocol(Faults(handovers=1, failures=1), keys=THREE, writers=TWO_AND_ONE),
    "a COMMIT without an answer, a crash, and late commits": Protocol(
        Faults(crashes=1, unanswered=1, failures=1), keys=THREE, writers=TWO_AND_ONE, relays=1
    ),
    "a relay taken for dead, a failure": Protocol(
        Faults(expiries=1, failures=1), keys=THREE, writers=TWO_AND_ONE, prompt=True
    ),
    "a relay taken for dead, failures": Protocol(
        Faults(expiries=1, failures=2), keys=THREE, writers=TWO_AND_ONE, prompt=True
    ),
    "a relay taken for dead, two keys, a failure": Protocol(Faults(expiries=1, failures=1), keys=(0, 1), prompt=True),
    "a relay taken for dead, three messages, two keys": Protocol(
        Faults(expiries=1), keys=(0, 1, 0), writers=TWO_AND_ONE, prompt=True
    ),
    "a relay taken for dead, a COMMIT without an answer": Protocol(
        Faults(expiries=1, unanswered=1, failures=1), prompt=True
    ),
    "a relay taken for dead, a crash": Protocol(Faults(expiries=1, crashes=1, failures=1), prompt=True),
    "a relay taken for dead, a handover, failures": Protocol(Faults(expiries=1, handovers=1, failures=2), prompt=True),
    "relays taken for dead twice": Protocol(Faults(expiries=2, failures=1), prompt=True),
    "a crash, a COMMIT without an answer": Protocol(
        Faults(crashes=1, unanswered=1, failures=1), keys=THREE, writers=TWO_AND_ONE, prompt=True
    ),
    "commits without an answer, a handover": Protocol(
        Faults(unanswered=2, handovers=1, failures=1), keys=THREE, writers=TWO_AND_ONE, prompt=True
    ),
    "a relay taken for dead, a COMMIT without an answer, three messages": Protocol(
        Faults(expiries=1, unanswered=1, failures=1), keys=THREE, writers=TWO_AND_ONE, prompt=True
    ),
    "a relay taken for dead, a handover without an answer": Protocol(
        Faults(expiries=1, unanswered=1, handovers=1, failures=1), prompt=True
    ),
    "three relays": Protocol(Faults(expiries=1, failures=1), relays=3, prompt=True),
    "three commits without an answer": Protocol(
        Faults(unanswered=3, failures=2), keys=THREE, writers=TWO_AND_ONE, relays=1, prompt=True
    ),
    "suspects, one after another": Protocol(
        Faults(crashes=2, failures=1), keys=THREE, writers=TWO_AND_ONE, suspects=True, prompt=True
    ),
    "three crashes of suspects": Protocol(Faults(crashes=3), suspects=True, prompt=True),
    "a suspect, and a relay taken for dead": Protocol(
        Faults(expiries=1, crashes=1, failures=1), suspects=True, prompt=True
    ),
    "a parked lane, a relay taken for dead": Protocol(
        Faults(expiries=1, failures=1, redrives=1),
        keys=THREE,
        writers=TWO_AND_ONE,
        tries=1,
        on_failure="park",
        strict=True,
        prompt=True,
    ),
    "a parked lane, a COMMIT without an answer": Protocol(
        Faults(unanswered=1, failures=2, redrives=2),
        keys=THREE,
        writers=TWO_AND_ONE,
        tries=1,
        on_failure="park",
        strict=True,
        prompt=True,
    ),
    "a crash of the server, late and prepared commits": Protocol(
        Faults(server_crashes=1, failures=1, rollbacks=1), keys=THREE, writers=TWO_AND_ONE, relays=1, prepares=True
    ),
    "two crashes of the server, a handover": Protocol(
        Faults(server_crashes=2, handovers=1, failures=2), keys=THREE, writers=TWO_AND_ONE, prompt=True
    ),
    "a crash of the server, a crash": Protocol(
        Faults(server_crashes=1, crashes=1, failures=2), keys=THREE, writers=TWO_AND_ONE, prompt=True
    ),
    "a crash of the server, suspects": Protocol(Faults(server_crashes=1, crashes=2), suspects=True, prompt=True),
    "a crash of the server, a relay taken for dead": Protocol(
        Faults(server_crashes=1, expiries=1, failures=1), prompt=True
    ),
    "a crash of the server, a COMMIT without an answer, a crash": Protocol(
        Faults(server_crashes=1, crashes=1, unanswered=1, failures=1),
        keys=THREE,
        writers=TWO_AND_ONE,
        relays=1,
        prompt=True,
    ),
    "a crash of the server, a parked lane": Protocol(
        Faults(server_crashes=1, failures=1, redrives=2),
        keys=THREE,
        writers=TWO_AND_ONE,
        tries=1,
        on_failure="park",
        strict=True,
        prompt=True,
    ),
}

_DISORDER: Final = "out of order"
_STUCK: Final = "nothing goes on"
"""Lost beyond a cursor, or held until the look at everything once a minute; the trace says which."""

_CRASH: Final = Faults(crashes=1, failures=1)
_SERVER_CRASH: Final = Faults(server_crashes=1, failures=2)
_EXPIRY: Final = Faults(expiries=1, failures=1)


def _with(
    *flaws: Flaw, faults: Faults = NO_FAULTS, relays: int = 2, prompt: bool = True, long: bool = False
) -> Protocol:
    world = Protocol(faults, relays=relays, prompt=prompt, flaws=flaws)
    return replace(world, keys=THREE, writers=TWO_AND_ONE) if long else world


FLAWED: Final = [
    (_DISORDER, _with(Flaw.BARE_CURSOR, relays=1, prompt=False)),
    (_DISORDER, _with(Flaw.XID_HORIZON, relays=1, prompt=False)),
    (_STUCK, _with(Flaw.LOCKS_BEFORE_POSITION, relays=1, prompt=False)),
    (_DISORDER, replace(_with(Flaw.PREPARED_IGNORED, relays=1, prompt=False), prepares=True)),
    (_DISORDER, _with(Flaw.UNFENCED_CLAIM, faults=_EXPIRY)),
    (_STUCK, replace(_with(Flaw.UNFENCED_TAKE, faults=_EXPIRY), keys=(0,), writers=(1,))),
    (_DISORDER, _with(Flaw.UNFENCED_TAKE, Flaw.OTHERS_DO_NOT_BLOCK, faults=_EXPIRY)),
    (_DISORDER, _with(Flaw.UNFENCED_SETTLE, faults=_EXPIRY)),
    (_DISORDER, _with(Flaw.SETTLE_WITHOUT_SLOTS, faults=_EXPIRY)),
    (_STUCK, replace(_with(Flaw.UNFENCED_REREAD, faults=_EXPIRY), keys=(0,), writers=(1,))),
    (_DISORDER, _with(Flaw.UNFENCED_REREAD, Flaw.OTHERS_DO_NOT_BLOCK, faults=_EXPIRY)),
    (_DISORDER, _with(Flaw.REREAD_FOR_ANOTHER, faults=_EXPIRY)),
    (_DISORDER, _with(Flaw.GAIN_WITHOUT_BLOCKED, faults=_EXPIRY)),
    (_DISORDER, _with(Flaw.GAIN_WITHOUT_REWIND, faults=Faults(handovers=1))),
    (_STUCK, replace(_with(Flaw.GAIN_DURING_READ, faults=Faults(handovers=1)), keys=(0, 1))),
    ("delivered again without a reason", _with(Flaw.NO_DRAINING, faults=Faults(handovers=1))),
    (_DISORDER, _with(Flaw.RELEASE_KEEPS, faults=Faults(handovers=1, failures=1))),
    (_STUCK, _with(Flaw.UNBLOCK_AFTER_HEAD, faults=Faults(failures=1), relays=1)),
    (_DISORDER, _with(Flaw.UNBLOCK_AFTER_HEAD, faults=_CRASH, long=True)),
    (_STUCK, _with(Flaw.UNBLOCK_DURING_MOVE, faults=Faults(failures=1), relays=1)),
    (_DISORDER, replace(_with(Flaw.UNBLOCK_LATE, faults=Faults(failures=2), relays=1), tries=3)),
    (_DISORDER, _with(Flaw.MOVE_BEFORE_HEAD, Flaw.TAKE_UNREAD, faults=_CRASH)),
    (_DISORDER, _with(Flaw.BLOCK_AFTER_SETTLE, faults=Faults(failures=1), relays=1)),
    (_DISORDER, _with(Flaw.LEAVES_FOLLOWERS, faults=Faults(failures=1), relays=1)),
    (_DISORDER, replace(_with(Flaw.DUE_BY_TIME, faults=Faults(crashes=2)), suspects=True)),
    (_STUCK, _with(Flaw.BURY_KEEPS_WAITING, faults=_CRASH)),
    (_DISORDER, _with(Flaw.BURY_KEEPS_WAITING, Flaw.OTHERS_DO_NOT_BLOCK, faults=_CRASH)),
    (_DISORDER, _with(Flaw.REREAD_AT_ONCE, faults=Faults(unanswered=1, failures=1), relays=1)),
    (_DISORDER, _with(Flaw.REREAD_TABLES_ONLY, faults=Faults(unanswered=1, failures=1), relays=1)),
    (_DISORDER, _with(Flaw.REREAD_BLOCKS, Flaw.TAKE_UNREAD, faults=_CRASH, relays=1, prompt=False, long=True)),
    (_STUCK, _with(Flaw.REREAD_KEEPS, faults=Faults(unanswered=1, failures=1), relays=1)),
    (
        _STUCK,
        replace(
            _with(Flaw.TAKE_WHILE_PARKED, faults=Faults(failures=2, redrives=1), relays=1, long=True),
            tries=1,
            on_failure="park",
        ),
    ),
    (_DISORDER, _with(Flaw.SETTLE_FORGOTTEN, faults=_SERVER_CRASH, relays=1)),
    (_DISORDER, _with(Flaw.SETTLE_NOT_DURABLE, faults=_SERVER_CRASH, relays=1)),
    (
        _DISORDER,
        replace(
            _with(Flaw.GAIN_NOT_DURABLE, faults=Faults(server_crashes=1, handovers=1, failures=1)),
            writers=(2,),
            limit=1,
        ),
    ),
]
"""What each leads to first; writers are prompt unless it has to do with late commits."""

HARMLESS: Final = [
    _with(Flaw.OTHERS_DO_NOT_BLOCK, faults=_EXPIRY),
    _with(Flaw.TAKE_UNREAD, faults=_CRASH, long=True),
    _with(Flaw.MOVE_BEFORE_HEAD, faults=_CRASH),
    _with(Flaw.REREAD_BLOCKS, faults=_CRASH, relays=1, prompt=False, long=True),
    _with(Flaw.TAKE_BEFORE_SETTLED, faults=Faults(unanswered=2, failures=1), relays=1, long=True),
    _with(Flaw.RELEASE_NOT_DURABLE, faults=Faults(server_crashes=1, handovers=1)),
]
"""What does no harm by itself in these worlds: something else catches it.

All but the last two are one of two belts, and with both of them off the promise breaks (see above). The last but one
is caught twice: a relay that rereads claims once more what it has in hand, and deletes what it delivered whoever claims
it. As for the last, nobody delivers what falls into a slot that was given away before a gain, and that is durable.
"""
