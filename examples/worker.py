"""A relay in a process of its own: delivers to standard output, until it is told to stop.

    DSN=postgresql://… python worker.py >> delivered.jsonl

The outbox must have been migrated. SIGTERM and SIGINT stop it in order: it claims nothing more, finishes what it is
delivering, settles that, and leaves the rest to the next relay. Any number of these processes may run at once.
"""

import asyncio
import logging
import os
import signal
import sys
from io import BufferedWriter

import anyio
import asyncpg
import orjson

from outbox import (
    BatchDelivered,
    DestinationUnavailableError,
    Event,
    Message,
    MessageFailed,
    Outbox,
    Relay,
    RelayStarted,
    RelayStopped,
)

log = logging.getLogger("worker")


class JsonLines:
    """Writes each message as one line of JSON.

    Args:
        file: Where to. Being buffered, it writes a batch as a whole, however the system cuts it up, and does not
            mix it with another one that is under way.
    """

    def __init__(self, file: BufferedWriter) -> None:
        self._file = file

    async def dispatch(self, *messages: Message) -> None:
        """Returns once the operating system has all of the lines: only then they count as delivered."""
        lines = b"".join(map(self._line, messages))
        try:
            # In a thread, because whoever reads a pipe may be slow, and a relay that does not get to
            # renew its lease is taken for dead.
            await anyio.to_thread.run_sync(self._append, lines)
        except OSError as error:
            # The disk is full or the reader gone: no message is to blame, so none of them spends an attempt.
            raise DestinationUnavailableError(f"cannot write: {error}") from error

    def _append(self, lines: bytes) -> None:
        self._file.write(lines)
        self._file.flush()

    @staticmethod
    def _line(message: Message) -> bytes:
        # The body is JSON already: it is forwarded as it stands, not decoded and encoded again.
        body = orjson.Fragment(message.body)
        fields = {"id": str(message.id), "topic": message.topic, "key": message.key, "payload": body}
        return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)


def report(event: Event) -> None:
    """Logs the events that the library does not log by itself."""
    match event:
        case RelayStarted():
            log.info("started")
        case BatchDelivered():
            log.info("delivered %d messages in %.3f s", len(event.messages), event.seconds)
        case MessageFailed():
            log.warning("%r failed, next try in %s: %r", event.message, event.delay, event.error)
        case RelayStopped():
            log.info("stopped, %d messages given back", event.given_back)
        case _:
            pass


async def main(dsn: str, output: BufferedWriter) -> None:
    """Relays until a signal comes."""
    # With no connection at first, it can start before the database; the relay itself keeps two.
    async with asyncpg.create_pool(dsn, min_size=0, max_size=2) as pool, anyio.create_task_group() as tasks:
        relay = Relay(Outbox(), pool, JsonLines(output), hooks=[report])
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            tasks.start_soon(relay.run)
            await anext(signals)
            log.info("stopping")
            await relay.stop()
        # All that was known is settled. A relay still waiting for its database to appear ends here, and the pool
        # without close(), which would wait for the answer of a database that may be gone.
        tasks.cancel_scope.cancel()
        pool.terminate()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Not sys.stdout.buffer, which is not buffered with PYTHONUNBUFFERED=1.
    with open(sys.stdout.fileno(), "wb", closefd=False) as output:
        asyncio.run(main(os.environ["DSN"], output))
