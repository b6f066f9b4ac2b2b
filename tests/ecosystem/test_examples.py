"""The examples are run as their readers would run them, and what they print and do is checked."""

import asyncio
import json
import os
import pty
import re
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from rich.console import Console

from outbox import Message, Outbox
from outbox.cli import demo

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C reaches the examples, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
async def session(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty folder for temporary files, open to the account of a server that root starts."""
    place = Path(tempfile.mkdtemp(prefix="outbox-examples-"))
    place.chmod(0o777)
    yield place
    shutil.rmtree(place)


@asynccontextmanager
async def running(
    *arguments: str, environment: dict[str, str] | None = None, stdout: int = PIPE
) -> AsyncIterator[Process]:
    """Runs Python in the root of the repository for the length of the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", *arguments),
        stdin=DEVNULL,
        stdout=stdout,
        stderr=PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def output(process: Process) -> str:
    """What a process prints until its end, which must be a success."""
    printed, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return printed.decode()


async def line_with(stream: asyncio.StreamReader | None, text: str) -> str:
    """Waits for a line with this text."""
    assert stream
    seen = []
    while line := (await stream.readline()).decode():
        seen.append(line)
        if text in line:
            return line
    raise AssertionError(f"no {text!r} in\n{''.join(seen)}")


def leftovers(place: Path) -> list[str]:
    """Files in a folder for temporary files, and processes that were told of it."""
    files = [str(path) for path in place.iterdir()]
    processes = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(place).encode() in (process / "environ").read_bytes():
                processes.append((process / "cmdline").read_text().replace("\0", " "))
    return files + processes


# --- quickstart.py ---------------------------------------------------------------------------------------


async def test_quickstart_delivers_what_was_committed_and_nothing_else() -> None:
    async with running("examples/quickstart.py") as quickstart:
        assert await output(quickstart) == (
            "committed:   order 1\n"
            "rolled back: order 2, no coffee left\n"
            "delivered:   OrderPlaced(number=1, item='tea')\n"
            "left over:   Counts(total=0, dispatched=0, pending=0, waiting=0, dead=0)\n"
        )


# --- fastapi_app.py --------------------------------------------------------------------------------------


@asynccontextmanager
async def application(*command: str, environment: dict[str, str]) -> AsyncIterator[tuple[Process, httpx.AsyncClient]]:
    """The web service on a port of its own, and a client of it."""
    async with running(*command, environment={"PORT": "0"} | environment) as process:
        line = await line_with(process.stderr, "Uvicorn running on")
        url = re.findall(r"http://[\d.:]+", line)[0]
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            yield process, client


@asynccontextmanager
async def fastapi_app(dsn: str) -> AsyncIterator[tuple[Process, httpx.AsyncClient]]:
    uvicorn = ("-m", "uvicorn", "fastapi_app:app", "--app-dir", "examples", "--port", "0")
    async with application(*uvicorn, environment={"DSN": dsn}) as process_and_client:
        yield process_and_client


async def test_fastapi_app_delivers_an_order(database: str) -> None:
    async with fastapi_app(database) as (process, client):
        response = await client.post("/orders", json={"item": "tea", "quantity": 3})
        assert response.status_code == 201
        order = response.json()
        assert order == {"order_id": order["order_id"], "item": "tea", "quantity": 3}
        assert order["order_id"] in await line_with(process.stdout, "delivered")
        assert (await client.get("/orders")).json() == [order["order_id"]]
        assert (await client.get("/delivered")).json() == [order]


@pytest.mark.parametrize("refused", [{"item": "tea", "quantity": 11}, {"item": "moon dust", "quantity": 1}])
async def test_fastapi_app_rolls_back_the_message_with_its_order(
    database: str, session: asyncpg.Connection, refused: dict[str, Any]
) -> None:
    async with fastapi_app(database) as (process, client):
        assert (await client.post("/orders", json=refused)).status_code == 409
        assert (await client.get("/orders")).json() == []
        assert (await Outbox().counts(session)).total == 0
        # What is written after it is delivered after it, so by then the other would have been seen.
        order = (await client.post("/orders", json={"item": "tea", "quantity": 1})).json()
        await line_with(process.stdout, "delivered")
        assert (await client.get("/delivered")).json() == [order]


async def test_fastapi_app_commits_before_it_answers(database: str, session: asyncpg.Connection) -> None:
    async with fastapi_app(database) as (_, client):
        # A rule that is looked at no earlier than in the COMMIT.
        await session.execute("""
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN RAISE check_violation; END $$;
            CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON orders
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()""")
        assert (await client.post("/orders", json={"item": "tea", "quantity": 1})).status_code == 409
        assert (await client.get("/orders")).json() == []
        assert (await Outbox().counts(session)).total == 0


async def test_fastapi_app_stops_its_relay(database: str, session: asyncpg.Connection) -> None:
    relays = "SELECT count(*) FROM outbox_relays"
    async with fastapi_app(database) as (process, _):
        assert await session.fetchval(relays) == 1
        process.send_signal(signal.SIGINT)
        await output(process)
        assert await session.fetchval(relays) == 0


async def test_fastapi_app_brings_a_database_if_it_has_none(place: Path) -> None:
    async with application("examples/fastapi_app.py", environment={"DSN": "", "TMPDIR": str(place)}) as (
        process,
        client,
    ):
        response = await client.post("/orders", json={"item": "tea", "quantity": 1})
        assert response.status_code == 201
        await line_with(process.stdout, "delivered")
        process.send_signal(signal.SIGINT)
        await output(process)
        assert leftovers(place) == []


# --- worker.py -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_worker_loses_and_repeats_nothing_when_it_is_stopped_and_started_again(
    database: str, session: asyncpg.Connection, number: signal.Signals
) -> None:
    outbox = Outbox()
    await outbox.migrate(session)
    # Far more than a pipe holds: the worker cannot be done before all of it is read.
    messages = [Message({"number": number, "filler": "x" * 200}, topic="orders") for number in range(5_000)]
    await outbox.persist(session, *messages)

    async with running("examples/worker.py", environment={"DSN": database}) as worker:
        first = [json.loads(await line_with(worker.stdout, "id"))]
        worker.send_signal(number)
        first += map(json.loads, (await output(worker)).splitlines())
    left = await outbox.retrieve(session, limit=10_000)
    assert 0 < len(first) < len(messages)
    assert len(first) + len(left) == len(messages)

    async with running("examples/worker.py", environment={"DSN": database}) as worker:
        second = [json.loads(await line_with(worker.stdout, "id")) for _ in left]
        worker.send_signal(number)
        assert await output(worker) == ""

    delivered = {UUID(line["id"]): line for line in first + second}
    assert len(first + second) == len(delivered) == len(messages)
    one = messages[17]
    assert delivered[one.id] == {"id": str(one.id), "topic": "orders", "key": None, "payload": one.payload}


async def test_worker_refuses_an_outbox_that_was_not_migrated(database: str) -> None:
    async with running("examples/worker.py", environment={"DSN": database}) as worker:
        await line_with(worker.stderr, "run outbox.migrate(connection)")
        assert await worker.wait() == 1


async def test_worker_says_what_it_does(database: str, session: asyncpg.Connection) -> None:
    await Outbox().migrate(session)
    await Outbox().persist(session, Message("hello", topic="greetings"))
    async with running("examples/worker.py", environment={"DSN": database}) as worker:
        await line_with(worker.stderr, "INFO worker: started")
        await line_with(worker.stderr, "INFO worker: delivered 1 messages")
        worker.send_signal(signal.SIGTERM)
        await line_with(worker.stderr, "INFO worker: stopping")
        await line_with(worker.stderr, "INFO worker: stopped, 0 messages given back")
        assert json.loads(await output(worker))["payload"] == "hello"


# --- demo.py ---------------------------------------------------------------------------------------------


async def test_demo_proves_that_nothing_was_lost_and_leaves_nothing_behind(place: Path) -> None:
    async with running("examples/demo.py", environment={"TMPDIR": str(place), "FORCE_COLOR": "1"}) as process:
        printed = await output(process)
    assert leftovers(place) == []
    # Readable in a file: no control characters, no line for each frame.
    assert re.findall(r"[^\n -~─-╿]", printed) == []
    assert len(printed.splitlines()) < 60
    killed, replacing = re.findall(r"relay (\d+) delivers", printed)
    assert f"relay {killed} killed with SIGKILL" in printed
    assert f"relay {replacing} stopped" in printed
    figures = {what.strip(): found for what, found in re.findall(r"│ (.+?) +│ +([\d,]+) │", printed)}
    assert int(figures["committed"].replace(",", "")) > 100
    assert int(figures["rolled back"].replace(",", "")) > 100
    assert figures["of these never delivered"] == figures["of these delivered all the same"] == "0"
    assert figures["of these not in flight at the kill"] == figures["dead letters"] == "0"
    assert printed.endswith("Every committed message was delivered, and no other.\n")


async def test_demo_shows_a_live_display_on_a_terminal_and_ends_on_ctrl_c(place: Path) -> None:
    terminal, its_end = pty.openpty()
    try:
        environment = {"TMPDIR": str(place), "TERM": "xterm"}
        async with running("examples/demo.py", environment=environment, stdout=its_end) as process:
            shown = await until_shown(terminal, "order service", "relay processes", "delivering")
            assert "\x1b[?25l" in shown
            process.send_signal(signal.SIGINT)
            shown = await until_shown(terminal, "\x1b[?25h", "interrupted")
            assert await process.wait() == 130
            assert leftovers(place) == []
    finally:
        os.close(terminal)
        os.close(its_end)


async def until_shown(terminal: int, *texts: str) -> str:
    """Waits until all of these have been shown, and returns what has."""
    readable, shown = asyncio.Event(), ""
    os.set_blocking(terminal, False)
    asyncio.get_running_loop().add_reader(terminal, readable.set)
    try:
        while not all(text in shown for text in texts):
            await readable.wait()
            readable.clear()
            with suppress(BlockingIOError):  # told of once more after it had been read
                shown += os.read(terminal, 65_536).decode(errors="replace")
    finally:
        asyncio.get_running_loop().remove_reader(terminal)
    return shown


@pytest.mark.parametrize(
    ("deliveries", "wrong"),
    [
        pytest.param(["one", "two", "two"], [], id="a duplicate that was in flight"),
        pytest.param(["one", "one", "two"], ["of these not in flight at the kill"], id="a duplicate that was not"),
        pytest.param(["two"], ["of these never delivered"], id="one lost"),
        pytest.param(["one", "two", "undone"], ["of these delivered all the same"], id="one rolled back"),
        pytest.param(["one", "two", "three"], ["of these delivered all the same"], id="one invented"),
    ],
)
def test_demo_notices_a_broken_promise(deliveries: list[str], wrong: list[str]) -> None:
    ids = {name: uuid4() for name in ("one", "two", "three", "undone")}
    ledger = demo.Ledger(
        written={ids["one"], ids["two"]},
        rolled_back={ids["undone"]},
        deliveries=Counter(ids[name] for name in deliveries),
        in_flight={ids["two"]},
    )
    comparison = demo.compare(ledger, {ids["one"], ids["two"]})
    assert [what.strip() for what, found, must_be in comparison if must_be not in (None, found)] == wrong
    assert demo.prove(Console(quiet=True), comparison) is not bool(wrong)
