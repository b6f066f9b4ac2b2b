"""`examples/inbox.py` is run as its reader would run it: a consumer is killed, and there is one invoice."""

import asyncio
import os
import shutil
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPECTED = """\
producer: order 1 is committed, with its message
relay: published to the broker
consumer 1: delivery 1, fresh: the invoice is written
consumer 1: killed, before it acknowledged
consumer 2: delivery 2, a duplicate: nothing to do
consumer 2: acknowledged
invoices: 1, unacknowledged: 0
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty folder for temporary files, open to the account of a server that root starts."""
    place = Path(tempfile.mkdtemp(prefix="outbox-inbox-"))
    place.chmod(0o777)
    yield place
    shutil.rmtree(place)


def leftovers(place: Path) -> list[str]:
    """Files in a folder for temporary files, and processes that were told of it."""
    found = [str(path) for path in place.iterdir()]
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(place).encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


async def test_a_consumer_killed_before_it_acknowledged_sees_a_duplicate_and_writes_one_invoice(place: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "examples/inbox.py"),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(place)},
    )
    try:
        async with asyncio.timeout(45):
            printed, errors = await process.communicate()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    assert (process.returncode, errors.decode()) == (0, "")
    assert printed.decode() == EXPECTED
    assert leftovers(place) == []


def test_the_how_to_shows_what_the_example_prints() -> None:
    assert EXPECTED in (ROOT / "docs/how-to/inbox.md").read_text(encoding="utf-8")
