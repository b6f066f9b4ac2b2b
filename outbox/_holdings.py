"""What one relay holds, and how much more it may hold: a bounded window."""

from collections.abc import Iterable

from outbox._claims import (
    SMALLEST_WINDOW,
    WINDOW_BYTES,
    Batch,
    Buried,
    Claim,
    Postponed,
    Room,
    Rows,
    Settlement,
    Suspect,
)
from outbox._outbox import position_of


class Holdings:
    """Counts the messages that a relay has claimed and that are not answered yet, by the destination or otherwise.

    Args:
        in_delivery: How many messages may be with the destination at once. Four times as many are held at most, and
            half of that is claimed at once: so one half is claimed while the other is delivered, and what was delivered
            before is settled.
    """

    def __init__(self, in_delivery: int) -> None:
        self.holds_crash_suspect = False
        self.half = max(SMALLEST_WINDOW, 2 * in_delivery)
        self._messages = 0
        # The claims of fresh messages, and the bytes of each message that waited.
        self._claims: dict[int, Claim] = {}
        self._waiting: dict[int, int] = {}

    @property
    def claims(self) -> Iterable[int]:
        """The claims that are not settled completely."""
        return self._claims

    @property
    def waiting(self) -> Iterable[int]:
        """The positions of those held that were waiting."""
        return self._waiting

    @property
    def is_half_full(self) -> bool:
        """Whether there is no need yet to claim more."""
        return self._messages > self.half or self._bytes > WINDOW_BYTES // 2

    def room(self) -> Room:
        """Returns how many fresh messages may be claimed."""
        return Room(min(self.half, 2 * self.half - self._messages), WINDOW_BYTES - self._bytes)

    def room_for_waiting(self) -> Room:
        """Returns how many waiting messages may be claimed: neither they nor the fresh ones crowd the others out."""
        return Room(self.half - len(self._waiting), WINDOW_BYTES - self._bytes)

    def add(self, batches: Iterable[Batch | Rows]) -> int:
        """Adds what was just claimed; returns how many messages that are."""
        before = self._messages
        for batch in batches:
            if isinstance(batch, Rows):
                self._messages += len(batch.rows)
                self._claims[batch.claim.upto] = batch.claim
            else:
                self._messages += len(batch.messages)
                self._waiting |= {position_of(message): len(message.body) for message in batch.messages}
                self.holds_crash_suspect |= batch.suspect is Suspect.CRASH
        return self._messages - before

    def forget(self, batch: Rows) -> None:
        """Removes a claim of one batch that was not delivered: what the table says of it is to be let go of."""
        self._messages -= len(batch.rows)
        del self._claims[batch.claim.upto]

    def doubt(self) -> None:
        """Has the claims in doubt: the database was lost, and may have forgotten them."""
        for claim in self._claims.values():
            claim.in_doubt = True

    def answer(self, count: int) -> None:
        """Makes room for as many others: what became of these is about to be settled."""
        self._messages -= count

    def remove(self, settlement: Settlement) -> None:
        """Removes what was settled."""
        for batch in settlement.batches:
            claim = batch.claim  # of which another may have the name by now: a server that crashed forgot the first
            if claim and claim.upto in settlement.finished_claims and self._claims.get(claim.upto) is claim:
                del self._claims[claim.upto]
        if self._waiting:
            outcomes: list[Postponed | Buried] = [*settlement.postponed, *settlement.buried]
            for position in (*settlement.delivered_waiting, *(outcome.position for outcome in outcomes)):
                self._waiting.pop(position, None)  # a fresh one that failed was not waiting before
        if settlement.crash_suspects:
            self.holds_crash_suspect = False

    @property
    def _bytes(self) -> int:
        return sum(claim.size for claim in self._claims.values()) + sum(self._waiting.values())
