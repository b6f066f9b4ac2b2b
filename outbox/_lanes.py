"""What a relay that keeps an order has in its hands, and which of it may go out next."""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

from outbox._claims import SMALLEST_WINDOW, WINDOW_BYTES, Room
from outbox._message import Message
from outbox._outbox import position_of

_LANES_BEHIND: Final = 4
"""How many times as many are held at most when lanes queue behind their own deliveries."""


class Reading:
    """Fresh messages that were read together, and of which some are in hand."""

    __slots__ = ("left", "size", "upto")

    def __init__(self, positions: Sequence[int], size: int) -> None:
        self.left = set(positions)
        self.upto = positions[-1]
        self.size = size


class Lanes:
    """Queues of messages, one for each lane; a lane is in one delivery at a time, however many messages of it.

    A delivery takes whole queues, the longest waiting first: so few lanes are in each, and many deliveries can be
    under way at once.

    Args:
        in_delivery: How many messages may be with the destination at once. Four times as many are held at most, and
            half of that is read at once: so one half is read while the other is delivered.
    """

    def __init__(self, in_delivery: int) -> None:
        self.held: dict[int, Message] = {}
        """By position: queued, in delivery, or answered and not settled yet."""
        self.half = max(SMALLEST_WINDOW, 4 * in_delivery) // 2
        self._limit = _LANES_BEHIND * 2 * self.half
        self._readings: list[Reading] = []
        # The bytes of each message that had been waiting.
        self._waiting: dict[int, int] = {}
        self._queues: dict[int | None, list[Message]] = {}
        # Those lanes whose queue may go out, each once.
        self._ready: deque[int | None] = deque()
        self._busy: set[int | None] = set()
        self._alone: set[int] = set()

    @property
    def is_half_full(self) -> bool:
        """Whether there is no need yet to read more.

        What is answered, and about to be settled, does not count. Nor does what is queued behind a delivery of its own
        lane: one that takes long must not keep the others from being read.
        """
        if self._bytes > WINDOW_BYTES // 2 or len(self.held) >= self._limit:
            return True
        count = sum([len(reading.left) for reading in self._readings]) + len(self._waiting)
        if count <= self.half:
            return False
        return count - sum([len(queue) for lane, queue in self._queues.items() if lane in self._busy]) > self.half

    def room(self) -> Room:
        """Returns how many fresh messages may be read."""
        return Room(min(self._limit - len(self.held), self.half), WINDOW_BYTES - self._bytes)

    def room_for_waiting(self) -> Room:
        """Returns how many waiting messages may be claimed: neither they nor the fresh ones crowd the others out."""
        return Room(self.half - len(self._waiting), WINDOW_BYTES - self._bytes)

    @property
    def _bytes(self) -> int:
        return sum(reading.size for reading in self._readings) + sum(self._waiting.values())

    @property
    def waiting(self) -> list[int]:
        """The positions of those in hand that had been waiting."""
        return list(self._waiting)

    def waited(self, positions: Iterable[int]) -> list[int]:
        """Returns which of these, in hand, had been waiting."""
        return [position for position in positions if position in self._waiting] if self._waiting else []

    def fresh(self) -> Iterator[Message]:
        """Goes through those in hand that had not been waiting."""
        return (message for position, message in self.held.items() if position not in self._waiting)

    @property
    def readings(self) -> list[tuple[int, list[int]]]:
        """The readings of which something is in hand: their names, and the positions that are."""
        return [(reading.upto, list(reading.left)) for reading in self._readings]

    def hold_fresh(self, messages: Sequence[Message]) -> None:
        """Takes messages in hand, read together, without queueing them."""
        positions = [message._position or 0 for message in messages]
        self.held.update(zip(positions, messages, strict=True))
        self._readings.append(Reading(positions, sum([len(message._body or b"") for message in messages])))

    def hold_waiting(self, message: Message, *, alone: bool) -> None:
        """Takes a message in hand that had been waiting; alone is in a batch of its own."""
        position = position_of(message)
        self.held[position] = message
        self._waiting[position] = len(message.body)
        if alone:
            self._alone.add(position)

    def queue(self, messages: Iterable[Message]) -> None:
        """Queues messages that are in hand, each at the end of its lane."""
        queues, busy, ready = self._queues, self._busy, self._ready
        for message in messages:
            lane = message._lane
            queue = queues.get(lane)
            if queue is None:
                queues[lane] = [message]
                if lane not in busy:
                    ready.append(lane)
            else:
                queue.append(message)

    def put_back(self, messages: Sequence[Message]) -> None:
        """Queues messages that were out for delivery, each lane's before what is queued of it.

        Those without a lane come last: none of them has a place to keep.
        """
        for message in reversed(messages):
            if message._lane is not None:
                self._queues.setdefault(message._lane, []).insert(0, message)  # its lane is busy until the end
        self.queue([message for message in messages if message._lane is None])

    def is_alone(self, message: Message) -> bool:
        """Says whether a message is delivered in a batch of its own."""
        return position_of(message) in self._alone

    def take(self, size: int) -> tuple[list[Message], list[int | None]]:
        """Returns the next messages that may go out together, up to so many, and the lanes that are busy with them."""
        messages: list[Message] = []
        lanes: list[int | None] = []
        queues, ready = self._queues, self._ready
        while ready and (room := size - len(messages)) > 0:
            lane = ready.popleft()
            queue = queues.pop(lane)
            count = room if not self._alone else self._together(queue[:room], first=not messages)
            if len(queue) > count:
                queues[lane], queue = queue[count:], queue[:count]
            if not queue:  # whose head goes out by itself, and something else goes out with this batch
                ready.appendleft(lane)
                break
            messages += queue
            if lane is not None:
                lanes.append(lane)
            elif None in queues:
                ready.append(None)
            if self._alone and self.is_alone(queue[0]):
                break
        self._busy.update(lanes)
        return messages, lanes

    def _together(self, queue: Sequence[Message], *, first: bool) -> int:
        """Returns how many of a queue go out in one batch: one that goes alone, or those before the next such."""
        for place, message in enumerate(queue):
            if self.is_alone(message):
                return place or int(first)
        return len(queue)

    def finish(self, lanes: Collection[int | None]) -> None:
        """Makes lanes free for their next delivery."""
        self._busy.difference_update(lanes)
        self._ready.extend(lane for lane in lanes if lane in self._queues)

    def pull(self, lane: int | None) -> list[Message]:
        """Takes what is queued of a lane out of it; it stays in hand until it is settled."""
        queue = self._queues.pop(lane, None)
        if queue is None:
            return []
        if lane not in self._busy:
            self._ready.remove(lane)
        return queue

    def queued(self) -> list[tuple[int | None, list[Message]]]:
        """Returns the lanes with what is queued of them."""
        return list(self._queues.items())

    def answer(self, positions: Collection[int]) -> list[int]:
        """Crosses messages off their readings; returns those of which nothing is left."""
        for reading in self._readings:
            reading.left.difference_update(positions)
        finished = [reading.upto for reading in self._readings if not reading.left]
        if finished:
            self._readings = [reading for reading in self._readings if reading.left]
        return finished

    def release(self, positions: Iterable[int]) -> None:
        """Lets messages out of hand: they are settled, or somebody else's."""
        for position in positions:
            self.held.pop(position, None)
        if self._waiting or self._alone:
            for position in self._waiting.keys() - self.held.keys():
                del self._waiting[position]
            self._alone &= self.held.keys()

    def clear(self) -> None:
        """Lets everything out of hand at once."""
        self.held.clear()
        self._readings.clear()
        self._waiting.clear()
        self._queues.clear()
        self._ready.clear()
        self._busy.clear()
        self._alone.clear()
