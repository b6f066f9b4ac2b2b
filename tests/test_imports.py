"""What `import outbox` brings with it: its three dependencies, what those bring themselves, and nothing else."""

import subprocess
import sys

EXTRAS = ("alembic", "cli", "destinations", "embedded", "instrumentation", "psycopg", "sqlalchemy", "testing")


def imported_by(statement: str) -> set[str]:
    """The names of all modules that a fresh process has after it."""
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(process.stdout.split())


def third_party(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} - sys.stdlib_module_names


def test_the_core_imports_asyncpg_anyio_and_orjson_and_what_they_do() -> None:
    theirs = third_party(imported_by("import asyncpg, anyio, orjson"))
    assert {"asyncpg", "anyio", "orjson"} <= theirs
    assert third_party(imported_by("import outbox")) - theirs == {"outbox"}


def test_the_core_imports_nothing_that_stands_behind_an_extra() -> None:
    ours = {name for name in imported_by("import outbox") if name.startswith("outbox.")}
    assert "outbox._relay" in ours
    assert not [name for name in ours if name.split(".")[1] in EXTRAS]


def test_the_core_imports_nothing_that_only_takes_time() -> None:
    added = imported_by("import outbox") - imported_by("import asyncpg, anyio, orjson")
    assert not {name for name in added if name.startswith(("anyio._core._tasks", "importlib.resources", "zipfile"))}
