"""What one relay holds, and how much more it may hold: a bounded window."""

from collections.abc import Iterable

from outbox._claims import SMALLEST_WINDOW, WINDOW_BYTES, Batch, Buried, Postponed, Room, Rows, Settlement, Suspect
from outbox._outbox import position_of


class Holdings:
    """Counts the messages that a relay has claimed and that are not answered yet, by the destination or otherwise.

    Args:
        in_delivery: How many messages may be with the destination at once. Four times as many are held at most, and
            half of that is claimed at once: so one half is claimed while the other is delivered.
    """

    def __init__(self, in_delivery: int) -> None:
        self.holds_crash_suspect = False
        self._window = max(2 * SMALLEST_WINDOW, 4 * in_delivery)
        self._messages = 0
        # The bytes of each claim of fresh messages, and of each message that waited.
        self._claims: dict[int, int] = {}
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
        return self._messages > self._window // 2 or self._bytes > WINDOW_BYTES // 2

    def room(self) -> Room:
        """Returns how many fresh messages may be claimed."""
        return Room(min(self._window // 2, self._window - self._messages), WINDOW_BYTES - self._bytes)

    def room_for_waiting(self) -> Room:
        """Returns how many waiting messages may be claimed: neither they nor the fresh ones crowd the others out."""
        return Room(self._window // 2 - len(self._waiting), WINDOW_BYTES - self._bytes)

    def add(self, batches: Iterable[Batch | Rows]) -> int:
        """Adds what was just claimed; returns how many messages that are."""
        before = self._messages
        for batch in batches:
            if isinstance(batch, Rows):
                self._messages += len(batch.rows)
                self._claims[batch.claim.upto] = batch.claim.size
            else:
                self._messages += len(batch.messages)
                self._waiting |= {position_of(message): len(message.body) for message in batch.messages}
                self.holds_crash_suspect |= batch.suspect is Suspect.CRASH
        return self._messages - before

    def answer(self, count: int) -> None:
        """Makes room for as many others: what became of these is about to be settled."""
        self._messages -= count

    def remove(self, settlement: Settlement) -> None:
        """Removes what was settled."""
        for upto in settlement.finished_claims:
            self._claims.pop(upto, None)  # twice the same when the server crashed and forgot the first
        if self._waiting:
            outcomes: list[Postponed | Buried] = [*settlement.postponed, *settlement.buried]
            for position in (*settlement.delivered_waiting, *(outcome.position for outcome in outcomes)):
                self._waiting.pop(position, None)  # a fresh one that failed was not waiting before
        if settlement.crash_suspects:
            self.holds_crash_suspect = False

    @property
    def _bytes(self) -> int:
        return sum(self._claims.values()) + sum(self._waiting.values())
