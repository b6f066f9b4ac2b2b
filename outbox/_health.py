"""Whether a relay lives, and whether what is due gets through it: for the probes of whoever runs it."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import anyio

from outbox._errors import describe
from outbox._outbox import DRIVER_ERRORS
from outbox._worker import Worker

_PROBE_SECONDS: Final = 2.0
"""How long the database may take to answer."""


@dataclass(frozen=True, slots=True)
class Health:
    """What `Relay.health` found."""

    alive: bool
    """Whether the relay runs and moves. If not, only a restart helps; a database that is away does not count."""
    ready: bool
    """Whether it is at work and keeps up: no problem at all."""
    oldest: timedelta | None
    """How long the oldest message has been waiting that is due and this relay's business, by the database's clock.

    None when there is none, when the relay stands by, and when the database did not answer.
    """
    problems: tuple[str, ...]
    """Each reason for not being ready, a sentence each."""


_NOT_RUNNING: Final = Health(alive=False, ready=False, oldest=None, problems=("the relay is not running",))


async def examine(worker: Worker | None, max_age: timedelta) -> Health:
    """Looks at a run of a relay, within the time limit whatever the database does."""
    if worker is None:
        return _NOT_RUNNING
    problems = []
    oldest = None
    try:
        with anyio.fail_after(_PROBE_SECONDS):
            oldest = await worker.oldest()
    except TimeoutError:
        problems.append(f"{worker.silent_one()} within {_PROBE_SECONDS:g} s")
    except DRIVER_ERRORS as error:
        problems.append(f"the database is away: {describe(error)}")
    if worker.has_ended:
        return _NOT_RUNNING
    # After that, so that a process which was frozen has had its chance to move.
    stuck = list(worker.stuck())
    problems += [*worker.not_at_work(), *stuck]
    if oldest is not None and oldest > max_age:
        problems.append(f"the oldest message that is due has been waiting for {oldest}, longer than {max_age}")
    return Health(alive=not stuck, ready=not problems, oldest=oldest, problems=tuple(problems))
