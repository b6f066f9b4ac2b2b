"""Up to which position everything is there to be seen: what an ordered delivery waits for."""

from collections.abc import Mapping
from typing import Final, NamedTuple

LOWEST: Final = -(2**63)
"""Below every position there can be; those of the sequence begin at 1, but a restored dump may bring others."""

HIGHEST: Final = 2**63 - 1
"""Above or at every position there can be."""

_PREPARED: Final = "-1/"
"""How the virtual transaction of a prepared one begins where preparing, or a restart, gives the locks to a new one."""
_WARN_AFTER: Final = 1.0
"""Seconds after which somebody should hear who is being waited for."""

Writers = Mapping[str, int | None]
"""Who holds the writers' lock: virtual transactions, and their pids where they have one."""


class Late(NamedTuple):
    """Writers that keep everybody waiting."""

    writers: Writers
    waited: float
    """Seconds."""
    passed_over: bool
    """Whether they are waited for no longer."""


class Horizon:
    """A bound that rises when every transaction that could still commit below it has ended.

    A writer holds a lock on the table from before it takes a position until after its commit is visible. So whoever
    reads the last position first, then who holds the lock, and later finds that all of those have let go, has seen
    everything up to that position. An unrelated transaction is not waited for, however long it takes.

    Args:
        patience: Seconds after which a writer is passed over. When it ends at last, what it wrote lies below the bound.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.reset()

    def reset(self) -> None:
        """Forgets everything: nothing is proven."""
        self.bound = LOWEST
        self._goal = LOWEST
        self._waiting_for: dict[str, int | None] = {}
        self._since = 0.0
        self._warned = False
        self._overdue: set[str] = set()

    @property
    def has_passed_over(self) -> bool:
        """Whether a writer that is waited for no longer is still at it."""
        return bool(self._overdue)

    def observe(self, last: int, writers: Writers, now: float) -> bool:
        """Takes in the last position and, read after it, who writes; returns whether a writer passed over has ended."""
        ended = self._overdue - writers.keys()
        self._overdue -= ended
        if self._waiting_for:
            self._wait_for(writers)
        if not self._waiting_for:
            # What was waited for has ended, so begin with the present.
            self.bound = max(self.bound, self._goal)
            self._goal, self._since, self._warned = last, now, False
            self._waiting_for = {name: pid for name, pid in writers.items() if name not in self._overdue}
            if not self._waiting_for:
                self.bound = max(self.bound, last)
        return bool(ended)

    def _wait_for(self, writers: Writers) -> None:
        gone = self._waiting_for.keys() - writers.keys()
        for name in gone:
            del self._waiting_for[name]
        # One of those that are gone may have prepared its commit, and holds the lock under another name.
        if any(not name.startswith(_PREPARED) for name in gone):
            self._waiting_for |= {
                name: pid for name, pid in writers.items() if name.startswith(_PREPARED) and name not in self._overdue
            }

    def late(self, now: float) -> Late | None:
        """Says, once each, that writers are being waited for, and that they are waited for no longer."""
        waited = now - self._since
        if not self._waiting_for or waited < min(_WARN_AFTER, self._patience):
            return None
        if waited >= self._patience:
            late = Late(dict(self._waiting_for), waited, passed_over=True)
            self._overdue |= self._waiting_for.keys()
            self._waiting_for.clear()
            self.bound = max(self.bound, self._goal)
            return late
        if self._warned:
            return None
        self._warned = True
        return Late(dict(self._waiting_for), waited, passed_over=False)
