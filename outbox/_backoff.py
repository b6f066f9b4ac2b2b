"""When to try again: pure functions of the attempts made and the error that ended the last one.

A strategy answers with the wait until the next attempt, or with `None`, which means: give up, this is a
dead letter. Nothing in here sleeps. The relay stores the answer in the row as a due time, so a message that
waits holds up nobody and survives a restart.

The strategies and their formulas are those of EventSauce's BackOff; the jitters go back to Marc Brooker,
"Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from math import isfinite, log
from random import SystemRandom
from typing import Protocol

_FOR_EVER = -1
_MICROSECOND = timedelta(microseconds=1)
_LONGEST = timedelta.max // _MICROSECOND


class BackOff(Protocol):
    """Decides what becomes of a message that was not delivered; any callable of this shape will do.

    Errors can be told apart by wrapping a strategy:

        def by_error(attempts: int, error: BaseException | None) -> timedelta | None:
            return None if isinstance(error, InvalidOrder) else strategy(attempts, error)
    """

    def __call__(self, attempts: int, error: BaseException | None, /) -> timedelta | None:
        """Returns how long to wait before the next attempt, or None to give up.

        Args:
            attempts: How many attempts have failed so far: 1 after the first.
            error: What ended the last attempt. None when nothing was raised: the process died in it.
        """


class RandomSource(Protocol):
    """Where a jitter takes its randomness from; a `random.Random` is one."""

    def random(self) -> float:
        """Returns the next number x with 0.0 <= x < 1.0."""


Jitter = Callable[[timedelta, RandomSource], timedelta]
"""Spreads one delay: (delay, source of randomness) → the delay to use instead."""


def no_jitter(delay: timedelta, _random: RandomSource, /) -> timedelta:
    """Keeps the delay: d. What failed as one batch comes due, and goes out, as one batch again."""
    return delay


def full_jitter(delay: timedelta, random: RandomSource, /) -> timedelta:
    """Draws from the whole of the delay: uniform in [0, d]. AWS: "Full Jitter"."""
    return _duration(random.random() * _microseconds(delay))


def half_jitter(delay: timedelta, random: RandomSource, /) -> timedelta:
    """Keeps half of the delay and draws the other half: uniform in [d/2, d]. AWS: "Equal Jitter"."""
    return _duration((0.5 + random.random() / 2) * _microseconds(delay))


def scattered_jitter(spread: float) -> Jitter:
    """Scatters the delay around itself: uniform in [d·(1 - spread), d·(1 + spread)].

    The only jitter that can lengthen a delay, by its spread even beyond a strategy's `maximum`.

    Args:
        spread: The share of the delay by which it may move either way: above 0, at most 1.

    Raises:
        ValueError: The spread is outside of that.
    """
    if not 0 < spread <= 1:
        raise ValueError(f"spread must be above 0 and at most 1, not {spread!r}")
    return partial(_scatter, spread)


def jitter_after(threshold: timedelta, inner: Jitter = full_jitter) -> Jitter:
    """Leaves short delays alone, jitters the rest of longer ones: t + inner(d - t) where d > t, else d.

    Args:
        threshold: Up to here a delay stays as it is; a longer one never falls below it.
        inner: The jitter for what lies beyond the threshold.

    Raises:
        ValueError: The threshold is negative.
    """
    if threshold < timedelta():
        raise ValueError(f"threshold must not be negative, not {threshold!r}")
    return partial(_jitter_beyond, threshold, inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class _GrowingBackOff(ABC):
    """What the strategies with a growing delay share; each adds its formula as `_delay`."""

    initial: timedelta = timedelta(milliseconds=100)
    maximum: timedelta = timedelta(minutes=5)
    max_tries: int = 20
    jitter: Jitter = no_jitter
    # SystemRandom has no state: processes forked from one parent do not draw the same delays.
    random: RandomSource = field(default_factory=SystemRandom, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuses settings that have no meaning."""
        _check_tries(self.max_tries)
        if self.initial < _MICROSECOND:
            raise ValueError(f"initial must be longer than zero, not {self.initial!r}; use NoWaiting for no delay")
        if self.maximum < self.initial:
            raise ValueError(f"maximum must be at least initial ({self.initial!r}), not {self.maximum!r}")

    def __call__(self, attempts: int, _error: BaseException | None = None, /) -> timedelta | None:
        """Returns how long to wait after this many failed attempts, or None to give up."""
        if _gives_up(attempts, self.max_tries):
            return None
        return self.jitter(self._delay(attempts), self.random)

    @abstractmethod
    def _delay(self, attempts: int) -> timedelta:
        """Returns the delay after this many failed attempts, at most `maximum`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExponentialBackOff(_GrowingBackOff):
    """Multiplies the delay from one attempt to the next: min(maximum, initial · base^(attempts - 1)).

    By default 100 ms, 200 ms, 400 ms … 5 minutes, and a dead letter after twenty retries: an outage of
    three quarters of an hour passes unnoticed, a poison message is found within the hour.

    Args:
        initial: The wait after the first failure, longer than zero.
        base: The factor of growth, at least 1; 1 keeps the delay constant.
        maximum: The longest delay, before the jitter.
        max_tries: How many retries before giving up: with 5, the sixth failure is the last. -1 for ever.
        jitter: Spreads the delay. None by default: relays share their work through the table, so there is
            no crowd to spread, and what failed as a batch can be sent again as a batch.
        random: Where the jitter takes its randomness from.

    Raises:
        ValueError: A setting is out of its range.
    """

    base: float = 2

    def __post_init__(self) -> None:
        """Refuses settings that have no meaning."""
        # Not super(): a slotted dataclass is a second class, which the zero-argument form does not know.
        _GrowingBackOff.__post_init__(self)
        if not (isfinite(self.base) and self.base >= 1):
            raise ValueError(f"base must be a finite number of at least 1, not {self.base!r}")

    def _delay(self, attempts: int) -> timedelta:
        # Compared as logarithms first, so the power is only ever taken where its result is below maximum.
        initial, growths = _microseconds(self.initial), attempts - 1
        if growths * log(self.base) >= log(_microseconds(self.maximum) / initial):
            return self.maximum
        return min(self.maximum, _duration(initial * self.base**growths))


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearBackOff(_GrowingBackOff):
    """Adds the same to the delay at each attempt: min(maximum, initial · attempts).

    By default 100 ms, 200 ms, 300 ms …, and a dead letter after twenty retries, 21 seconds in all.

    Args:
        initial: The wait after the first failure, longer than zero, and what each further one adds.
        maximum: The longest delay, before the jitter.
        max_tries: How many retries before giving up: with 5, the sixth failure is the last. -1 for ever.
        jitter: Spreads the delay; none by default.
        random: Where the jitter takes its randomness from.

    Raises:
        ValueError: A setting is out of its range.
    """

    def _delay(self, attempts: int) -> timedelta:
        return min(self.maximum, _duration(_microseconds(self.initial) * attempts))


@dataclass(frozen=True, slots=True, kw_only=True)
class FibonacciBackOff(_GrowingBackOff):
    """Grows the delay along the Fibonacci numbers: min(maximum, initial · F(attempts)), F = 1, 1, 2, 3, 5 ….

    Slower to grow than the exponential one, quicker than the linear one: by default 100, 100, 200, 300,
    500 ms … 5 minutes, and a dead letter after twenty retries, 21 minutes in all.

    Args:
        initial: The wait after the first failure, longer than zero.
        maximum: The longest delay, before the jitter.
        max_tries: How many retries before giving up: with 5, the sixth failure is the last. -1 for ever.
        jitter: Spreads the delay; none by default.
        random: Where the jitter takes its randomness from.

    Raises:
        ValueError: A setting is out of its range.
    """

    def _delay(self, attempts: int) -> timedelta:
        initial, longest = _microseconds(self.initial), _microseconds(self.maximum)
        # Summed in integers: the closed form over the golden ratio drifts from the 71st number on. The sum
        # passes any timedelta within 110 steps, however many attempts there were.
        delay, following = initial, initial
        for _ in range(attempts - 1):
            if delay >= longest:
                break
            delay, following = following, delay + following
        return _duration(min(delay, longest))


@dataclass(frozen=True, slots=True, kw_only=True)
class NoWaiting:
    """Tries again at once, up to `max_tries` times. For tests, and for errors that pass by themselves.

    Args:
        max_tries: How many retries before giving up: with 5, the sixth failure is the last. -1 for ever,
            which keeps the relay busy with a message that never succeeds.

    Raises:
        ValueError: `max_tries` is below -1.
    """

    max_tries: int = 5

    def __post_init__(self) -> None:
        """Refuses settings that have no meaning."""
        _check_tries(self.max_tries)

    def __call__(self, attempts: int, _error: BaseException | None = None, /) -> timedelta | None:
        """Returns a wait of zero, or None to give up."""
        return None if _gives_up(attempts, self.max_tries) else timedelta()


@dataclass(frozen=True, slots=True)
class FailImmediately:
    """Never tries again: the first failure makes a dead letter."""

    def __call__(self, _attempts: int, _error: BaseException | None = None, /) -> timedelta | None:
        """Returns None: give up."""
        return None


def _check_tries(max_tries: int) -> None:
    if max_tries < _FOR_EVER:
        raise ValueError(f"max_tries must be -1 (for ever), 0 or more, not {max_tries!r}")


def _gives_up(attempts: int, max_tries: int) -> bool:
    if attempts < 1:
        raise ValueError(f"attempts counts the failures so far, at least 1, not {attempts!r}")
    return max_tries != _FOR_EVER and attempts > max_tries


def _scatter(spread: float, delay: timedelta, random: RandomSource) -> timedelta:
    return _duration((1 - spread + 2 * spread * random.random()) * _microseconds(delay))


def _jitter_beyond(threshold: timedelta, inner: Jitter, delay: timedelta, random: RandomSource) -> timedelta:
    return delay if delay <= threshold else threshold + inner(delay - threshold, random)


def _microseconds(delay: timedelta) -> int:
    return delay // _MICROSECOND


def _duration(microseconds: float) -> timedelta:
    # Integers all the way down: timedelta * float overflows where this stops at the longest there is.
    return timedelta(microseconds=min(round(microseconds), _LONGEST))
