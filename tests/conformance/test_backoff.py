"""Back-off as EventSauce knows it: its strategies, its jitters, its figures, and not its overflow."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from datetime import timedelta
from itertools import islice
from random import Random
from time import perf_counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox import (
    BackOff,
    ExponentialBackOff,
    FailImmediately,
    FibonacciBackOff,
    LinearBackOff,
    NoWaiting,
    full_jitter,
    half_jitter,
    jitter_after,
    no_jitter,
    scattered_jitter,
)

HUNDRED_MS = timedelta(milliseconds=100)
MICROSECOND = timedelta(microseconds=1)
SECOND = timedelta(seconds=1)
ERROR = ConnectionError("the broker hung up")

Growing = type[ExponentialBackOff] | type[LinearBackOff] | type[FibonacciBackOff]
GROWING: list[Growing] = [ExponentialBackOff, LinearBackOff, FibonacciBackOff]
Jitter = Callable[[timedelta, Any], timedelta]
DRAWS = 100_000


class Fixed:
    """A source of randomness that always answers the same."""

    def __init__(self, number: float) -> None:
        self._number = number

    def random(self) -> float:
        return self._number


LOWEST, HIGHEST = Fixed(0.0), Fixed(1.0 - 2**-53)


def delays(backoff: BackOff, count: int) -> list[timedelta | None]:
    return [backoff(attempts, ERROR) for attempts in range(1, count + 1)]


def milliseconds(*numbers: float) -> list[timedelta]:
    return [timedelta(milliseconds=number) for number in numbers]


def fibonacci() -> Iterator[int]:
    number, following = 1, 1
    while True:
        yield number
        number, following = following, number + following


# Figures


def test_exponential_from_100_ms_by_base_2_doubles_until_it_is_capped() -> None:
    backoff = ExponentialBackOff(initial=HUNDRED_MS, base=2, maximum=SECOND)
    assert delays(backoff, 6) == milliseconds(100, 200, 400, 800, 1000, 1000)


def test_exponential_takes_a_fractional_base() -> None:
    backoff = ExponentialBackOff(initial=HUNDRED_MS, base=1.5, maximum=SECOND)
    assert delays(backoff, 4) == milliseconds(100, 150, 225, 337.5)


def test_exponential_by_base_1_stays_constant() -> None:
    backoff = ExponentialBackOff(initial=HUNDRED_MS, base=1, maximum=SECOND)
    assert delays(backoff, 3) == milliseconds(100, 100, 100)


def test_exponential_reaches_a_maximum_that_is_a_power_exactly() -> None:
    backoff = ExponentialBackOff(initial=MICROSECOND, maximum=MICROSECOND * 2**40, max_tries=-1)
    assert delays(backoff, 42) == [MICROSECOND * 2**n for n in range(41)] + [MICROSECOND * 2**40]


def test_linear_adds_the_same_each_time_until_it_is_capped() -> None:
    backoff = LinearBackOff(initial=HUNDRED_MS, maximum=timedelta(milliseconds=350))
    assert delays(backoff, 5) == milliseconds(100, 200, 300, 350, 350)


def test_fibonacci_grows_along_1_1_2_3_5_until_it_is_capped() -> None:
    backoff = FibonacciBackOff(initial=HUNDRED_MS, maximum=SECOND)
    assert delays(backoff, 7) == milliseconds(100, 100, 200, 300, 500, 800, 1000)


def test_fibonacci_does_not_drift_at_63_and_above() -> None:
    backoff = FibonacciBackOff(initial=MICROSECOND, maximum=timedelta.max, max_tries=-1)
    numbers = list(islice(fibonacci(), 90))
    assert numbers[62] == 6_557_470_319_842
    assert delays(backoff, 90) == [number * MICROSECOND for number in numbers]


def test_no_waiting_tries_again_at_once() -> None:
    assert delays(NoWaiting(max_tries=3), 3) == [timedelta()] * 3


def test_immediately_failing_never_tries_again() -> None:
    assert delays(FailImmediately(), 3) == [None] * 3


# Giving up


@pytest.mark.parametrize("strategy", [*GROWING, NoWaiting])
def test_max_tries_5_gives_up_after_the_sixth_call(strategy: Callable[..., BackOff]) -> None:
    answers = delays(strategy(max_tries=5), 7)
    assert [answer is None for answer in answers] == [False] * 5 + [True] * 2


@pytest.mark.parametrize("strategy", [*GROWING, NoWaiting])
def test_no_tries_gives_up_after_the_first_call(strategy: Callable[..., BackOff]) -> None:
    assert strategy(max_tries=0)(1, ERROR) is None


@pytest.mark.parametrize("strategy", [*GROWING, NoWaiting])
def test_minus_1_tries_go_on_for_ever(strategy: Callable[..., BackOff]) -> None:
    assert strategy(max_tries=-1)(1_000_000, ERROR) is not None


@pytest.mark.parametrize("strategy", [*GROWING, NoWaiting])
def test_a_message_that_never_succeeds_is_given_up_by_default(strategy: Callable[..., BackOff]) -> None:
    assert None in delays(strategy(), 100)


@pytest.mark.parametrize("strategy", GROWING)
def test_a_retry_by_default_waits_but_never_longer_than_minutes(strategy: Growing) -> None:
    waits = [wait for wait in delays(strategy(), 100) if wait is not None]
    assert all(timedelta() < wait <= timedelta(minutes=5) for wait in waits)
    assert waits == sorted(waits)


@pytest.mark.parametrize("strategy", [*GROWING, NoWaiting, FailImmediately])
def test_a_process_that_died_without_an_error_is_answered_too(strategy: Callable[[], BackOff]) -> None:
    assert strategy()(1, None) == strategy()(1, ERROR)


def test_any_function_of_attempts_and_error_is_a_back_off() -> None:
    patient = LinearBackOff(initial=SECOND)

    def by_error(attempts: int, error: BaseException | None) -> timedelta | None:
        return None if isinstance(error, ValueError) else patient(attempts, error)

    backoff: BackOff = by_error
    assert backoff(1, ERROR) == SECOND
    assert backoff(1, ValueError("no such order")) is None


# Defect 7: the overflow of the exponential delay


@pytest.mark.parametrize("strategy", GROWING)
@pytest.mark.parametrize("attempts", [64, 1_024, 10_000, 10**9])
@pytest.mark.parametrize("maximum", [timedelta(minutes=1), timedelta.max])
def test_defect_7_no_number_of_attempts_overflows(strategy: Growing, attempts: int, maximum: timedelta) -> None:
    delay = strategy(maximum=maximum, max_tries=-1)(attempts, ERROR)
    assert delay is not None
    assert SECOND < delay <= maximum


@pytest.mark.parametrize("base", [2, 1.000_001, 1e300])
def test_defect_7_no_base_overflows(base: float) -> None:
    backoff = ExponentialBackOff(base=base, maximum=timedelta.max, max_tries=-1)
    assert backoff(10**9, ERROR) == timedelta.max


@pytest.mark.parametrize("jitter", [full_jitter, half_jitter, scattered_jitter(1), jitter_after(SECOND)])
@pytest.mark.parametrize("source", [LOWEST, HIGHEST])
def test_defect_7_no_jitter_overflows(jitter: Jitter, source: Fixed) -> None:
    backoff = ExponentialBackOff(maximum=timedelta.max, max_tries=-1, jitter=jitter, random=source)
    delay = backoff(10_000, ERROR)
    assert delay is not None
    assert timedelta() <= delay <= timedelta.max


@pytest.mark.parametrize("strategy", GROWING)
def test_ten_thousand_attempts_are_answered_at_once(strategy: Growing) -> None:
    backoff = strategy(maximum=timedelta.max, max_tries=-1)
    started = perf_counter()
    for attempts in range(10_000, 11_000):
        backoff(attempts, ERROR)
    assert perf_counter() - started < 1  # about 10 ms; a loop over the attempts or a big power takes seconds


@settings(deadline=None)  # the limit of every test is enough; a busy machine is not a failure
@given(
    initial=st.timedeltas(min_value=MICROSECOND, max_value=timedelta(days=1)),
    headroom=st.timedeltas(min_value=timedelta(), max_value=timedelta(days=365)),
    base=st.floats(min_value=1, max_value=1e6),
    attempts=st.integers(min_value=1, max_value=20_000),
)
def test_a_delay_never_shrinks_and_stays_between_initial_and_maximum(
    initial: timedelta, headroom: timedelta, base: float, attempts: int
) -> None:
    maximum = initial + headroom
    strategies: list[BackOff] = [
        ExponentialBackOff(initial=initial, maximum=maximum, max_tries=-1, base=base),
        LinearBackOff(initial=initial, maximum=maximum, max_tries=-1),
        FibonacciBackOff(initial=initial, maximum=maximum, max_tries=-1),
    ]
    for backoff in strategies:
        now, later = backoff(attempts, ERROR), backoff(attempts + 1, ERROR)
        assert now is not None
        assert later is not None
        assert initial <= now <= later <= maximum


# Jitters: each in its bounds over 100,000 draws, and using the whole of them


def drawn(jitter: Jitter, delay: timedelta) -> tuple[timedelta, timedelta]:
    random = Random(20250511)
    draws = [jitter(delay, random) for _ in range(DRAWS)]
    return min(draws), max(draws)


@pytest.mark.parametrize(
    ("jitter", "delay", "lowest", "highest"),
    [
        (no_jitter, 1000, 1000, 1000),
        (full_jitter, 1000, 0, 1000),
        (half_jitter, 1000, 500, 1000),
        (scattered_jitter(0.25), 1000, 750, 1250),
        (scattered_jitter(1), 1000, 0, 2000),
        (jitter_after(timedelta(milliseconds=400)), 1000, 400, 1000),
        (jitter_after(timedelta(milliseconds=400), half_jitter), 1000, 700, 1000),
        (jitter_after(timedelta(milliseconds=400)), 400, 400, 400),
        (jitter_after(timedelta(milliseconds=400)), 399, 399, 399),
    ],
)
def test_a_jitter_stays_in_its_bounds(jitter: Jitter, delay: float, lowest: float, highest: float) -> None:
    low, high = drawn(jitter, timedelta(milliseconds=delay))
    floor, ceiling = milliseconds(lowest, highest)
    margin = (ceiling - floor) / 1000
    assert floor <= low <= floor + margin
    assert ceiling - margin <= high <= ceiling


@pytest.mark.parametrize("jitter", [full_jitter, half_jitter, scattered_jitter(0.5), jitter_after(SECOND)])
def test_a_jitter_leaves_no_delay_without_delay(jitter: Jitter) -> None:
    assert jitter(timedelta(), HIGHEST) == timedelta()


@pytest.mark.parametrize("strategy", GROWING)
def test_a_strategy_jitters_the_capped_delay_from_the_source_it_is_given(strategy: Growing) -> None:
    backoff = strategy(initial=HUNDRED_MS, maximum=SECOND, max_tries=-1, jitter=half_jitter, random=LOWEST)
    assert backoff(1, ERROR) == HUNDRED_MS / 2
    assert backoff(100, ERROR) == SECOND / 2


@pytest.mark.parametrize("strategy", GROWING)
def test_equal_seeds_give_equal_delays(strategy: Growing) -> None:
    first, second = (strategy(jitter=full_jitter, random=Random(7)) for _ in range(2))
    assert delays(first, 20) == delays(second, 20)


def test_without_a_source_of_its_own_a_strategy_draws_differently_each_time() -> None:
    backoff = ExponentialBackOff(initial=SECOND, jitter=full_jitter)
    assert len({backoff(1, ERROR) for _ in range(20)}) > 1


# Values, and what they refuse


@pytest.mark.parametrize("strategy", [*GROWING, NoWaiting, FailImmediately])
def test_a_strategy_is_an_immutable_value(strategy: Callable[[], BackOff]) -> None:
    backoff = strategy()
    assert backoff == strategy()
    assert hash(backoff) == hash(strategy())
    assert not hasattr(backoff, "__dict__")
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        backoff.max_tries = 1  # type: ignore[attr-defined]


def test_settings_are_named() -> None:
    for strategy in [*GROWING, NoWaiting]:
        kinds = {parameter.kind for parameter in inspect.signature(strategy).parameters.values()}
        assert kinds == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("strategy", GROWING)
@pytest.mark.parametrize("initial", [timedelta(), -SECOND])
def test_a_growing_delay_cannot_start_at_nothing(strategy: Growing, initial: timedelta) -> None:
    with pytest.raises(ValueError, match="initial must be longer than zero"):
        strategy(initial=initial)


@pytest.mark.parametrize("strategy", GROWING)
def test_the_maximum_cannot_be_below_the_start(strategy: Growing) -> None:
    with pytest.raises(ValueError, match="maximum must be at least initial"):
        strategy(initial=SECOND, maximum=HUNDRED_MS)


@pytest.mark.parametrize("strategy", [*GROWING, NoWaiting])
def test_tries_below_minus_1_have_no_meaning(strategy: Callable[..., BackOff]) -> None:
    with pytest.raises(ValueError, match="max_tries must be -1"):
        strategy(max_tries=-2)


@pytest.mark.parametrize("base", [0.99, 0, -2, float("nan"), float("inf")])
def test_the_base_cannot_shrink_the_delay(base: float) -> None:
    with pytest.raises(ValueError, match="base must be a finite number"):
        ExponentialBackOff(base=base)


@pytest.mark.parametrize("spread", [0, -0.1, 1.1, float("nan")])
def test_a_scatter_cannot_reach_below_zero(spread: float) -> None:
    with pytest.raises(ValueError, match="spread must be"):
        scattered_jitter(spread)


def test_a_threshold_cannot_be_negative() -> None:
    with pytest.raises(ValueError, match="threshold must not be negative"):
        jitter_after(-SECOND)


@pytest.mark.parametrize("strategy", [*GROWING, NoWaiting])
@pytest.mark.parametrize("attempts", [0, -1])
def test_before_the_first_failure_there_is_nothing_to_decide(strategy: Callable[[], BackOff], attempts: int) -> None:
    with pytest.raises(ValueError, match="attempts counts the failures so far"):
        strategy()(attempts, ERROR)
