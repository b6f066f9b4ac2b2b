"""PgBouncer in transaction mode, in front of a server of the tests."""

import asyncio
import os
import shutil
import socket
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.guard import guard

_START_SECONDS = 10

# One database and one user, whoever connects; neither a pid file nor a log file.
_CONFIGURATION = """
[databases]
* = host=127.0.0.1 port={server_port} user=postgres

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 500
"""


@asynccontextmanager
async def pgbouncer(dsn: str, *, pool_size: int = 20) -> AsyncIterator[str]:
    """Yields the DSN of a PgBouncer in front of the server at `dsn`."""
    program, port = _program(), _free_port()
    text = _CONFIGURATION.format(server_port=urlsplit(dsn).port, port=port, pool_size=pool_size)
    with tempfile.TemporaryDirectory(prefix="pgbouncer-") as folder:
        process = await _start(program, _written(folder, text))
        try:
            async with asyncio.timeout(_START_SECONDS):
                await _up(process)
            # Somebody has to read the log: a full pipe would block the writer.
            reading = asyncio.create_task(process.communicate())
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
            process.terminate()
            await reading
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _program() -> str:
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is not None:
        return program
    remedy = "pgbouncer is not installed: apt-get install --no-install-recommends -y pgbouncer"
    if os.geteuid() == 0:
        pytest.fail(remedy)
    pytest.skip(f"{remedy} (root only)")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _written(folder: str, text: str) -> str:
    file = Path(folder) / "pgbouncer.ini"
    file.write_text(text)
    for path in (Path(folder), file):
        path.chmod(0o755)  # when we are root, another account reads it
    return str(file)


async def _start(program: str, configuration: str) -> Process:
    # It refuses to run as root, and must not outlive a test run that is killed.
    account = "nobody" if os.geteuid() == 0 else None
    return await asyncio.create_subprocess_exec(
        *guard("TERM"),
        program,
        configuration,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        cwd="/",
        user=account,
        extra_groups=account and [],
    )


async def _up(process: Process) -> None:
    assert process.stdout is not None
    log = []
    async for line in process.stdout:
        log.append(line.decode())
        if "process up" in log[-1]:
            return
    raise RuntimeError(f"PgBouncer did not start:\n{''.join(log)}")
