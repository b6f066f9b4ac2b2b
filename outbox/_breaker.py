"""Holds deliveries back while the destination is down: a circuit breaker, which knows a part from the whole."""

import math
from datetime import timedelta
from typing import Final, NamedTuple

import anyio

from outbox._backoff import BackOff

_MEMORY: Final = 60.0
"""Seconds for which it is remembered that something was refused, or that it was only a part of the destination."""
_IN_A_ROW: Final = 10
"""Calls refused one after the other that open the breaker even where only a part is known to be away."""
_PATIENCE: Final = 1.0
"""Seconds that a try has at least, before another delivery is let through beside it."""


class Refusal(NamedTuple):
    """What follows from the answer that the destination is unavailable."""

    for_all: bool
    """Whether nothing is dispatched until the delay is over; otherwise only what was refused waits so long."""
    delay: timedelta


class Breaker:
    """Closed while the destination answers; open, for longer each time, after it said that it is unavailable.

    When the time is over one delivery is let through to try; the others wait for what becomes of it. It may hang, so
    that when the same time is over again, a second at least, another one is let through as well.

    A destination may be away in part: a topic, a queue, one of several brokers behind it. That shows when others are
    accepted in the same call, or between two refusals. Then what is refused waits by itself, and the breaker opens
    only after many refusals in a row.

    Args:
        backoff: How long it stays open after so many failures in a row; it never gives up, so None is no wait.
    """

    def __init__(self, backoff: BackOff) -> None:
        self._backoff = backoff
        self._failures = 0
        self._delay = timedelta()
        self._open_until = 0.0
        self._changed = anyio.Event()
        self._trying = False
        self._ended = False
        # Of what is away in part: calls refused since the last that was not, what is known until when, and the rounds
        # of tries, each as long as what is refused in it waits.
        self._in_a_row = 0
        self._remembers_until = self._is_part_until = -math.inf
        self._rounds = 0
        self._round_delay = timedelta()
        self._round_ends = -math.inf

    async def admit(self) -> bool:
        """Returns True when a delivery may go ahead, False when the relay is stopping and it never will.

        Each admission must be answered by accepted(), refused() or released().
        """
        while self._failures and not self._ended:
            now = anyio.current_time()
            if now >= self._open_until:
                self._trying = True
                self._open_until = now + max(self._delay.total_seconds(), _PATIENCE)
                return True
            with anyio.move_on_after(self._open_until - now):
                await self._changed.wait()
        return not self._ended

    def end(self) -> None:
        """Admits nobody any more: the relay is stopping."""
        self._ended = True
        self._change()

    def accepted(self) -> bool:
        """Closes the breaker; returns whether it was open."""
        was_open = self._failures > 0
        self._failures = self._in_a_row = 0
        self._change()
        return was_open

    def refused(self, error: BaseException, *, in_part: bool) -> Refusal:
        """Opens the breaker, or leaves it open for longer after another try, unless only a part is away.

        Args:
            error: Handed to the back-off.
            in_part: Whether something else was accepted in the same call, and accepted() told so.
        """
        now = anyio.current_time()
        if in_part or (not self._in_a_row and now < self._remembers_until):
            self._is_part_until = now + _MEMORY
        self._remembers_until = now + _MEMORY
        self._in_a_row += not in_part
        if now < self._is_part_until and self._in_a_row < _IN_A_ROW:
            self._change()
            return Refusal(for_all=False, delay=self._wait_in_part(error, now))
        return Refusal(for_all=True, delay=self._open(error, now))

    def _open(self, error: BaseException, now: float) -> timedelta:
        if self._failures and not self._trying:  # was on its way already when the breaker opened: no news
            return timedelta(seconds=max(0.0, self._open_until - now))
        self._failures += 1
        self._delay = self._backoff(self._failures, error) or timedelta()
        self._open_until = now + self._delay.total_seconds()
        self._change()
        return self._delay

    def _wait_in_part(self, error: BaseException, now: float) -> timedelta:
        if now >= self._round_ends:
            # Were it still away, what was refused in the last round would have been refused again by now.
            is_back = now > self._round_ends + 2 * self._round_delay.total_seconds() + 1
            self._rounds = 1 if is_back else self._rounds + 1
            self._round_delay = self._backoff(self._rounds, error) or timedelta()
            self._round_ends = now + self._round_delay.total_seconds()
        return self._round_delay

    def released(self) -> None:
        """Takes an admission back that led to no answer, since its delivery was cancelled."""
        if self._trying:  # so another one may
            self._open_until = anyio.current_time()
        self._change()

    def _change(self) -> None:
        self._trying = False
        self._changed.set()
        self._changed = anyio.Event()
