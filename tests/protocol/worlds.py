"""The worlds that are gone through: small ones by the tests, large ones by hand, and one in which each flaw shows."""

from typing import Final

from tests.protocol.model import Protocol
from tests.protocol.world import Faults, Flaw

THREE: Final = (0, 0, 0)
"""Three messages of one key; the first writer writes two of them, and any of the three may be the other's."""
TWO_AND_ONE: Final = (2, 1)

SMALL: Final = {
    "writers that prepare, roll back and commit late": Protocol(
        Faults(failures=1, rollbacks=1), keys=THREE, writers=TWO_AND_ONE, relays=1, prepares=True
    ),
    "failures, retries and a dead letter": Protocol(Faults(failures=4), keys=THREE, writers=TWO_AND_ONE, relays=1),
    "one at a time": Protocol(Faults(crashes=1, failures=1), keys=THREE, writers=TWO_AND_ONE, limit=1),
    "a relay taken for dead": Protocol(Faults(expiries=1, failures=1)),
    "a relay taken for dead, two keys": Protocol(Faults(expiries=1), keys=(0, 1)),
    "a crash": Protocol(Faults(crashes=1, failures=1), keys=THREE, writers=TWO_AND_ONE),
    "suspects of two crashes": Protocol(Faults(crashes=2, failures=1), suspects=True),
    "a handover": Protocol(Faults(handovers=1, failures=1), keys=THREE, writers=TWO_AND_ONE),
    "a COMMIT without an answer, a crash": Protocol(
        Faults(crashes=1, unanswered=1, failures=1), keys=THREE, writers=TWO_AND_ONE, relays=1
    ),
    "a handover without an answer": Protocol(Faults(unanswered=1, failures=1, handovers=1)),
    "a parked lane": Protocol(
        Faults(failures=2, redrives=2), keys=THREE, writers=TWO_AND_ONE, tries=1, on_failure="park", strict=True
    ),
    "a parked lane, and a relay taken for dead": Protocol(
        Faults(expiries=1, failures=1, redrives=1), tries=1, on_failure="park", strict=True
    ),
}

LARGE: Final = {
    "a relay taken for dead, a failure": Protocol(Faults(expiries=1, failures=1), keys=THREE, writers=TWO_AND_ONE),
    "a relay taken for dead, failures": Protocol(Faults(expiries=1, failures=2), keys=THREE, writers=TWO_AND_ONE),
    "a relay taken for dead, two keys, a failure": Protocol(Faults(expiries=1, failures=1), keys=(0, 1)),
    "a relay taken for dead, three messages, two keys": Protocol(
        Faults(expiries=1), keys=(0, 1, 0), writers=TWO_AND_ONE
    ),
    "a relay taken for dead, a COMMIT without an answer": Protocol(Faults(expiries=1, unanswered=1, failures=1)),
    "a relay taken for dead, a crash": Protocol(Faults(expiries=1, crashes=1, failures=1)),
    "a relay taken for dead, a handover, failures": Protocol(Faults(expiries=1, handovers=1, failures=2)),
    "relays taken for dead twice": Protocol(Faults(expiries=2, failures=1)),
    "a crash, a COMMIT without an answer": Protocol(
        Faults(crashes=1, unanswered=1, failures=1), keys=THREE, writers=TWO_AND_ONE
    ),
    "commits without an answer, a handover": Protocol(
        Faults(unanswered=2, handovers=1, failures=1), keys=THREE, writers=TWO_AND_ONE
    ),
    "a relay taken for dead, a COMMIT without an answer, three messages": Protocol(
        Faults(expiries=1, unanswered=1, failures=1), keys=THREE, writers=TWO_AND_ONE
    ),
    "a relay taken for dead, a handover without an answer": Protocol(
        Faults(expiries=1, unanswered=1, handovers=1, failures=1)
    ),
    "three relays": Protocol(Faults(expiries=1, failures=1), relays=3),
    "three commits without an answer": Protocol(
        Faults(unanswered=3, failures=2), keys=THREE, writers=TWO_AND_ONE, relays=1
    ),
    "suspects, one after another": Protocol(
        Faults(crashes=2, failures=1), keys=THREE, writers=TWO_AND_ONE, suspects=True
    ),
    "three crashes of suspects": Protocol(Faults(crashes=3), suspects=True),
    "a suspect, and a relay taken for dead": Protocol(Faults(expiries=1, crashes=1, failures=1), suspects=True),
    "a parked lane, a relay taken for dead": Protocol(
        Faults(expiries=1, failures=1, redrives=1),
        keys=THREE,
        writers=TWO_AND_ONE,
        tries=1,
        on_failure="park",
        strict=True,
    ),
    "a parked lane, a COMMIT without an answer": Protocol(
        Faults(unanswered=1, failures=2, redrives=2),
        keys=THREE,
        writers=TWO_AND_ONE,
        tries=1,
        on_failure="park",
        strict=True,
    ),
}

_DISORDER: Final = "out of order"
_STUCK: Final = "nothing goes on"
"""Lost beyond a cursor, or held for ever; the trace says which."""

FLAWED: Final = [
    (_STUCK, Protocol(relays=1, flaw=Flaw.BARE_CURSOR)),
    (_DISORDER, Protocol(Faults(handovers=1), flaw=Flaw.BARE_CURSOR)),
    (_STUCK, Protocol(relays=1, flaw=Flaw.XID_HORIZON)),
    (_DISORDER, Protocol(Faults(handovers=1), flaw=Flaw.XID_HORIZON)),
    (_STUCK, Protocol(relays=1, flaw=Flaw.LOCKS_BEFORE_POSITION)),
    (_STUCK, Protocol(relays=1, prepares=True, flaw=Flaw.PREPARED_IGNORED)),
    (_DISORDER, Protocol(Faults(expiries=1, failures=1), flaw=Flaw.UNFENCED_CLAIM)),
    (_DISORDER, Protocol(Faults(expiries=1, failures=1), flaw=Flaw.UNFENCED_TAKE)),
    (_STUCK, Protocol(Faults(expiries=1, failures=1), flaw=Flaw.UNFENCED_SETTLE)),
    (_DISORDER, Protocol(Faults(expiries=1, failures=1), flaw=Flaw.GAIN_WITHOUT_BLOCKED)),
    (_STUCK, Protocol(Faults(handovers=1), flaw=Flaw.GAIN_WITHOUT_REWIND)),
    (_STUCK, Protocol(Faults(expiries=1), keys=(0, 1), flaw=Flaw.GAIN_DURING_READ)),
    ("delivered again without a reason", Protocol(Faults(handovers=1), flaw=Flaw.NO_DRAINING)),
    (_STUCK, Protocol(Faults(handovers=1, failures=1), flaw=Flaw.RELEASE_KEEPS)),
    (_STUCK, Protocol(Faults(failures=1), relays=1, flaw=Flaw.UNBLOCK_AFTER_HEAD)),
    (_DISORDER, Protocol(Faults(crashes=1, failures=1), keys=THREE, writers=TWO_AND_ONE, flaw=Flaw.UNBLOCK_AFTER_HEAD)),
    (_STUCK, Protocol(Faults(failures=1), relays=1, flaw=Flaw.UNBLOCK_DURING_MOVE)),
    (_DISORDER, Protocol(Faults(failures=2), tries=3, relays=1, flaw=Flaw.UNBLOCK_LATE)),
    (_DISORDER, Protocol(Faults(crashes=1, failures=1), flaw=Flaw.MOVE_BEFORE_HEAD)),
    (_DISORDER, Protocol(Faults(failures=1), relays=1, flaw=Flaw.BLOCK_AFTER_SETTLE)),
    (_DISORDER, Protocol(Faults(failures=1), relays=1, flaw=Flaw.LEAVES_FOLLOWERS)),
    (_DISORDER, Protocol(Faults(crashes=2), suspects=True, flaw=Flaw.DUE_BY_TIME)),
    (_STUCK, Protocol(Faults(crashes=1, failures=1), flaw=Flaw.BURY_KEEPS_WAITING)),
    (_STUCK, Protocol(Faults(unanswered=1, failures=1), relays=1, flaw=Flaw.REREAD_AT_ONCE)),
    (_DISORDER, Protocol(Faults(crashes=1, unanswered=1, failures=1), relays=1, flaw=Flaw.REREAD_AT_ONCE)),
    (_DISORDER, Protocol(Faults(unanswered=1, failures=1), relays=1, flaw=Flaw.REREAD_TABLES_ONLY)),
    (
        _STUCK,
        Protocol(
            Faults(unanswered=2, failures=1),
            keys=THREE,
            writers=TWO_AND_ONE,
            relays=1,
            flaw=Flaw.TAKE_BEFORE_SETTLED,
        ),
    ),
    (
        _DISORDER,
        Protocol(
            Faults(crashes=1, unanswered=1, failures=1),
            keys=THREE,
            writers=TWO_AND_ONE,
            relays=1,
            flaw=Flaw.REREAD_BLOCKS,
        ),
    ),
    (_STUCK, Protocol(Faults(unanswered=1, failures=1), relays=1, flaw=Flaw.REREAD_KEEPS)),
    (
        _STUCK,
        Protocol(
            Faults(failures=2, redrives=1),
            keys=THREE,
            writers=TWO_AND_ONE,
            tries=1,
            relays=1,
            on_failure="park",
            flaw=Flaw.TAKE_WHILE_PARKED,
        ),
    ),
]
"""What each leads to first."""
