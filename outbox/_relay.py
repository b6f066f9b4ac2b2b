"""The worker between the table and the destination: `Relay`."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from outbox._backoff import BackOff, ExponentialBackOff, half_jitter
from outbox._claims import CommitStrategy
from outbox._delivery import Upcast
from outbox._dispatcher import Dispatcher, require_dispatchers
from outbox._errors import OutboxError, describe
from outbox._events import Hook
from outbox._health import Health, examine
from outbox._outbox import DRIVER_ERRORS, Outbox, Pool
from outbox._owning import OnFailure
from outbox._queries import Ordering
from outbox._worker import Settings, Worker

if TYPE_CHECKING:  # it would be a quarter of the time that importing this library takes
    from anyio.abc import TaskStatus

_DESTINATION_DOWN: Final = ExponentialBackOff(
    initial=timedelta(milliseconds=200), maximum=timedelta(seconds=15), max_tries=-1, jitter=half_jitter
)


class Relay:
    """Claims messages that were committed, hands them to a destination, and settles them.

    At least once: a message is delivered if its transaction committed, and twice only where a process, a
    connection or the server died, or a time limit passed, between the destination's answer and the settling.
    Any number of relays may work on one table at the same time, in this process and elsewhere; none of them
    holds a transaction open while its destination works.

    It keeps two connections of the pool while it runs: a destination that uses the same pool needs more.

    Args:
        outbox: The table and codec.
        pool: An asyncpg pool of at least two connections.
        destination: Any dispatcher.
        batch_size: How many messages one call of the destination gets at most.
        concurrency: How many calls of the destination are under way at once. With 1 and a single relay, messages
            go out nearly in the order of their positions; order is promised only by `order`.
        commit: Whether delivered messages are deleted or kept, marked.
        keep: With `CommitStrategy.MARK`, how long marked messages are kept. None keeps them until
            `Outbox.cleanup`.
        backoff: When a failed message is tried again, and when it is given up as a dead letter.
        destination_backoff: How long to hold back while the destination is unavailable.
        order: "none": competing relays, no order. "key": the messages of a key reach the destination in the order of
            their positions, whatever the number of relays; those without a key are free. "total": all messages do, by
            one relay at a time. All relays of a table have the same order; one of another stands by.
        on_failure: What becomes of the messages behind one that failed, where an order is kept. "block": they wait
            until it is delivered, or given up. "park": the same, but when it is given up they join it among the dead
            letters; they go on, in order, when it is redriven or discarded. "skip": they do not wait.
        late_commit_wait: How long an order waits for a transaction that wrote messages and does not end. After that
            its messages are delivered when it commits, out of order. Other transactions are not waited for.
        upcast: Makes of each stored message those that are dispatched, settled as one. Give them ids that stay
            the same from one delivery to the next, for example `uuid.uuid5(message.id, "1")`.
        hooks: Called with each event.
        dispatch_timeout: How long one call of the destination may take; after that it is cancelled and counts as
            a failure.
        lease: How long after its last sign of life a relay is held to be dead, and what it held is tried again.
            The sign is given every third of it; a process that blocks its event loop for longer is taken for dead.
        grace: How long `stop` lets deliveries finish.
        poll_interval: The longest wait between two looks at an idle table.
        listen: Also wake up by NOTIFY, sent by a `Notifier` in the writers' processes. It needs a third connection,
            and a pool that leads to PostgreSQL itself or a pooler in session mode.

    Raises:
        TypeError: When the destination has no `dispatch`, or a setting is of another kind.
        ValueError: When a setting is out of its range.
    """

    def __init__(
        self,
        outbox: Outbox,
        pool: Pool,
        destination: Dispatcher,
        *,
        batch_size: int = 100,
        concurrency: int = 4,
        commit: CommitStrategy = CommitStrategy.DELETE,
        keep: timedelta | None = None,
        backoff: BackOff | None = None,
        destination_backoff: BackOff = _DESTINATION_DOWN,
        order: Ordering = "none",
        on_failure: OnFailure = "block",
        late_commit_wait: timedelta = timedelta(seconds=30),
        upcast: Upcast | None = None,
        hooks: Iterable[Hook] = (),
        dispatch_timeout: timedelta = timedelta(seconds=30),
        lease: timedelta = timedelta(seconds=10),
        grace: timedelta = timedelta(seconds=10),
        poll_interval: timedelta = timedelta(milliseconds=100),
        listen: bool = False,
    ) -> None:
        for name, number in (("batch_size", batch_size), ("concurrency", concurrency)):
            _check_kind(name, number, int)
            if number < 1:
                raise ValueError(f"{name} must be at least 1, not {number!r}")
        durations = {
            "dispatch_timeout": dispatch_timeout,
            "lease": lease,
            "grace": grace,
            "late_commit_wait": late_commit_wait,
        }
        for name, duration in {**durations, "poll_interval": poll_interval}.items():
            _check_kind(name, duration, timedelta)
            if duration <= timedelta():
                raise ValueError(f"{name} must be longer than zero, not {duration!r}")
        _check_kind("commit", commit, CommitStrategy)  # anything else would be taken for DELETE
        if keep is not None and commit is not CommitStrategy.MARK:
            raise ValueError("keep is for marked messages: it needs commit=CommitStrategy.MARK")
        _check_order(order, on_failure)
        _check_strategies(backoff=backoff, destination_backoff=destination_backoff)
        _check_kind("outbox", outbox, Outbox)
        require_dispatchers(destination)
        hooks = _several(hooks)
        self._settings = Settings(
            outbox=outbox,
            pool=pool,
            destination=destination,
            batch_size=batch_size,
            concurrency=concurrency,
            commit=commit,
            keep=keep,
            backoff=ExponentialBackOff() if backoff is None else backoff,
            destination_backoff=destination_backoff,
            upcast=upcast,
            hooks=hooks,
            poll_interval=poll_interval,
            listen=listen,
            order=order,
            on_failure=on_failure,
            **durations,
        )
        self._worker: Worker | None = None

    async def run(self, *, task_status: "TaskStatus[None] | None" = None) -> None:
        """Relays until `stop` is called or the task is cancelled.

        It is ready (`task_status.started()`) when it has reached the database and begins to claim. It outlives the
        database: it reconnects for ever. A cancellation ends running deliveries at once, and their messages are
        delivered again; `stop` lets them finish.

        Raises:
            SchemaError: When the tables are missing, older or newer than this version of the library.
            OutboxError: When the database refuses for a reason that time does not heal, a missing privilege say.
            RuntimeError: When it is running already.
        """
        if self._worker is not None:
            raise RuntimeError("this relay is running already: make another Relay for a second one")
        self._require_connections()
        self._worker = Worker(self._settings)
        try:
            with surfacing_alone(f"the relay of {self._settings.outbox!r} cannot go on"):
                await self._worker.run(task_status.started if task_status else _nothing)
        finally:
            self._worker = None

    async def run_once(self) -> int:
        """Delivers one batch, if there is one, and returns how many messages were delivered.

        Fresh messages come first, then those that are due again, then the suspects of a crash, one by one. What
        fails waits for its next attempt, as in `run`. It may be called while `run` is running, here or elsewhere;
        where an order is kept it then delivers nothing, since what there is belongs to the others.

        Raises:
            SchemaError: When the tables are missing, older or newer than this version of the library.
            OutboxError: When the database refuses or is away.
        """
        self._require_connections()
        with surfacing_alone(f"the relay of {self._settings.outbox!r} cannot deliver"):
            return await Worker(self._settings).run_once()

    async def stop(self) -> None:
        """Stops the relay: no more claims, running deliveries get the grace period, everything known is settled.

        It returns when `run` is about to, within the grace period even if the database does not answer. What
        could not be delivered is due at once, for any relay. It does nothing when the relay is not running.
        """
        if self._worker is not None:
            await self._worker.stop()

    async def health(self, *, max_age: timedelta = timedelta(minutes=1)) -> Health:
        """Looks whether `run` is alive and keeps up, for the probes of whoever runs it.

        Alive means that it runs and moves. It is not when `run` has not begun or has ended, and when a call of the
        destination ignores its cancellation at the time limit: then only a restart helps. A database or a destination
        that is away leaves it alive, since the relay goes on by itself when they are back.

        Ready means that, besides, the database answers and no message that is due has been waiting for longer than
        `max_age`. Counted are those that this relay holds and those that nobody does or, with an order, those of the
        keys that are this relay's; not those that are delayed, wait for their next attempt, or stand behind another
        that does. A relay that stands by for another order is ready.

        It takes two seconds at most, and a few index lookups however long the backlog is, on a connection that the
        relay has anyway. It never raises for what it finds.

        Args:
            max_age: How long a message that is due may wait.

        Raises:
            ValueError: When `max_age` is not longer than zero.
        """
        if max_age <= timedelta():
            raise ValueError(f"max_age must be longer than zero, not {max_age!r}")
        return await examine(self._worker, max_age)

    def _require_connections(self) -> None:
        pool, wanted = self._settings.pool, 3 if self._settings.listen else 2
        if not hasattr(pool, "get_max_size"):
            raise TypeError(f"pool must be a pool of asyncpg, not {type(pool).__name__}")
        if not getattr(pool, "_initialized", True):  # the driver's error for it is that of a database that is away
            raise ValueError("the pool is not open yet: `pool = await asyncpg.create_pool(…)`, or `async with` it")
        if pool.get_max_size() < wanted:
            raise ValueError(
                f"the relay keeps {wanted} connections: give it a pool with max_size of at least {wanted}, "
                "and more when others, the destination for one, use the same pool"
            )


def _nothing() -> None:
    """Hears that the relay is ready, when nobody waits for it."""


# Types are told and not values: what was given in the wrong place may be a connection string with its password.
def _check_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of the type {kind.__name__}, not {type(value).__name__}")


def _check_strategies(**strategies: object) -> None:
    for name, strategy in strategies.items():
        if strategy is not None and not callable(strategy):
            raise TypeError(f"{name} must be a strategy such as LinearBackOff(), not {type(strategy).__name__}")


def _several(hooks: Iterable[Hook]) -> tuple[Hook, ...]:
    """Returns the hooks; raises for one that was given by itself, and for what cannot be called."""
    if not isinstance(hooks, Iterable):
        raise TypeError(f"hooks must be several, such as [hook], not {type(hooks).__name__}")
    for hook in (several := tuple(hooks)):
        if not callable(hook):
            raise TypeError(f"hooks must be functions that take an event, not {type(hook).__name__}")
    return several


def _check_order(order: Ordering, on_failure: OnFailure) -> None:
    if order not in {"none", "key", "total"}:
        raise ValueError(f"order must be 'none', 'key' or 'total', not {order!r}")
    if on_failure not in {"block", "park", "skip"}:
        raise ValueError(f"on_failure must be 'block', 'park' or 'skip', not {on_failure!r}")
    if on_failure != "block" and order == "none":
        raise ValueError(f"on_failure={on_failure!r} is for an order: it needs order='key' or order='total'")
    if on_failure == "park" and order == "total":
        raise ValueError("on_failure='park' with order='total' would bury every message: use 'block' or 'skip'")


@contextmanager
def surfacing_alone(what: str) -> Iterator[None]:
    """Raises the one error that ended a group of tasks as itself, and the driver's as this library's.

    Several of the driver's, which tasks met at the same moment, are one: the first.
    """
    the_drivers = (*DRIVER_ERRORS, TimeoutError)
    try:
        yield
    except BaseException as error:
        cause = error
        while isinstance(cause, BaseExceptionGroup) and (
            len(cause.exceptions) == 1 or cause.split(the_drivers)[1] is None
        ):
            cause = cause.exceptions[0]
        if isinstance(cause, the_drivers):
            raise OutboxError(f"{what}: {describe(cause)}") from cause
        if cause is not error:
            raise cause from None
        raise
