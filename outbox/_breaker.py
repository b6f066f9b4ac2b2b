"""Holds deliveries back while the destination is down: a circuit breaker."""

from datetime import timedelta

import anyio

from outbox._backoff import BackOff


class Breaker:
    """Closed while the destination answers; open, for longer each time, after it said that it is unavailable.

    When the time is over one delivery is let through to try; the others wait for what becomes of it.

    Args:
        backoff: How long it stays open after so many failures in a row; it never gives up, so None is no wait.
    """

    def __init__(self, backoff: BackOff) -> None:
        self._backoff = backoff
        self._failures = 0
        self._open_until = 0.0
        self._changed = anyio.Event()
        self._trying = False
        self._ended = False

    async def admit(self) -> bool:
        """Returns True when a delivery may go ahead, False when the relay is stopping and it never will.

        Each admission must be answered by succeeded(), failed() or released().
        """
        while self._failures and not self._ended:
            wait = self._open_until - anyio.current_time()
            if wait <= 0 and not self._trying:
                self._trying = True
                return True
            with anyio.move_on_after(wait if wait > 0 else None):
                await self._changed.wait()
        return not self._ended

    def end(self) -> None:
        """Admits nobody any more: the relay is stopping."""
        self._ended = True
        self._change()

    def succeeded(self) -> bool:
        """Closes the breaker; returns whether it was open."""
        was_open = self._failures > 0
        self._failures = 0
        self._change()
        return was_open

    def failed(self, error: BaseException) -> timedelta:
        """Opens the breaker, or leaves it open for longer after another try; returns for how long."""
        if self._failures and not self._trying:  # was on its way already when the breaker opened: no news
            return timedelta(seconds=max(0.0, self._open_until - anyio.current_time()))
        self._failures += 1
        delay = self._backoff(self._failures, error) or timedelta()
        self._open_until = anyio.current_time() + delay.total_seconds()
        self._change()
        return delay

    def released(self) -> None:
        """Takes an admission back that led to no answer, since its delivery was cancelled."""
        self._change()

    def _change(self) -> None:
        self._trying = False
        self._changed.set()
        self._changed = anyio.Event()
