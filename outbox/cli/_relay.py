"""`outbox relay`: a worker for production."""

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, Final, Literal

import anyio
from cyclopts import Parameter

from outbox._relay import Relay
from outbox.cli._failures import MISTAKE, Failure, surfacing
from outbox.cli._probes import Address, serve_probes
from outbox.cli._settings import Duration
from outbox.cli._target import relay_of
from outbox.instrumentation.logging import JsonFormatter

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_log: Final = logging.getLogger("outbox")


def relay(
    target: Annotated[str, Parameter(name="MODULE:ATTRIBUTE")],
    /,
    *,
    health: Annotated[str | None, Parameter(metavar="HOST:PORT")] = None,
    max_age: Duration = timedelta(minutes=1),
    log_format: Literal["text", "json"] = "text",
    log_level: Literal["debug", "info", "warning", "error"] = "info",
) -> int:
    """Run a relay until SIGTERM or Ctrl-C stops it; a second signal ends it at once.

    MODULE:ATTRIBUTE is a function without arguments that gives the relay, best an asynccontextmanager, or the relay
    itself. The module is looked for in this directory too.

    Args:
        target: Where the relay comes from: shop.worker:relay.
        health: Serve /live and /ready there; a PORT alone is of 127.0.0.1.
        max_age: How long a message that is due may wait before /ready says 503.
        log_format: Of the log, on standard error.
        log_level: The least that is logged.
    """
    address = None if health is None else Address.parse(health)
    _configure_log(log_format, log_level)
    with asyncio.Runner(loop_factory=_fastest()) as runner:
        return runner.run(_until_stopped(target, address, max_age))


def _fastest() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Returns what makes uvloop's event loop where that is installed: it reads what was claimed in fewer pieces."""
    try:
        from uvloop import new_event_loop  # noqa: PLC0415 -- an option
    except ImportError:
        return None
    return new_event_loop


async def _until_stopped(target: str, address: Address | None, max_age: timedelta) -> int:
    try:
        await _Work(target, address, max_age).run()
    except Failure as failure:
        _log.error("%s", failure)
        return failure.status
    except Exception:  # noqa: BLE001 -- of the user's own code: told with its traceback, in the format of the log
        _log.exception("%s failed", target)
        return MISTAKE
    return 0


class _Work:
    """A relay, its probes and the signals that stop it."""

    def __init__(self, target: str, address: Address | None, max_age: timedelta) -> None:
        self._target = target
        self._address = address
        self._max_age = max_age
        self._starting = anyio.CancelScope()
        self._has_started = False
        self._asked = asyncio.Event()

    async def run(self) -> None:
        with self._on_signals(), self._starting, surfacing("the relay cannot work"):
            async with relay_of(self._target) as found, anyio.create_task_group() as tasks:
                self._has_started = True
                if self._address is not None:
                    await tasks.start(serve_probes, found, self._address, self._max_age)
                tasks.start_soon(self._stop_when_asked, found)
                if not self._asked.is_set():
                    await found.run()
                tasks.cancel_scope.cancel()

    async def _stop_when_asked(self, found: Relay) -> None:
        await self._asked.wait()
        await found.stop()

    @contextmanager
    def _on_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._ask, number)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _ask(self, number: signal.Signals) -> None:
        for one in _SIGNALS:  # the next one ends the process at once, whatever hangs; that loses no message
            asyncio.get_running_loop().remove_signal_handler(one)
            signal.signal(one, signal.SIG_DFL)
        _log.info("%s: the relay finishes what it delivers, and stops", number.name)
        self._asked.set()
        if not self._has_started:
            self._starting.cancel()


def _configure_log(log_format: str, log_level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=log_level.upper(), handlers=[handler], force=True)
