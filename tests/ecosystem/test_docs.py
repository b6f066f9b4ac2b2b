"""Every block of Python in README.md and docs/ is run against a real PostgreSQL, as it stands.

How to write a block that runs:

- The blocks of a page run from top to bottom in one namespace, as if pasted into `python -m asyncio`: `await`
  works outside of a function.
- `DATABASE_URL` in the environment names a database that is this page's alone and empty at its top.
- What a block needs or should prove but a reader need not see goes into a comment, which is run in its place:

      <!-- python
      assert delivered == 1
      -->

- A block of `text` right below a block of Python is what that one prints; it is compared.
- When the page ends, no task of its own may be left.
- Code that is not to be run is not marked as `python`.
"""

import ast
import asyncio
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import asyncpg
import pytest

from outbox.embedded import Server
from tests.destinations.brokers import Process

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(
    r"^(?:```python[^\n]*|<!-- python)\n(?P<code>.*?)^(?:```|-->)\n"
    r"(?:\n*^```text[^\n]*\n(?P<output>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A block of Python, the line before it in its page, and what it is said to print."""

    page: Path
    line: int
    code: str
    output: str | None

    def compiled(self) -> CodeType:
        # Line numbers as in the page, so a traceback points there.
        tree = ast.parse("\n" * self.line + self.code, filename=str(self.page))
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(tree, str(self.page), "exec", flags=flags, dont_inherit=True)
        assert isinstance(code, CodeType)
        return code

    async def run(self, namespace: dict[str, Any]) -> None:
        printed = StringIO()
        with redirect_stdout(printed):
            result = FunctionType(self.compiled(), namespace)()
            if inspect.iscoroutine(result):
                await result
        if self.output is not None:
            assert printed.getvalue() == self.output, f"{self.page.name}, below line {self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        yield Block(page, line, match["code"], match["output"])


def title(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=title)
async def test_every_block_of_the_page_runs(page: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", database)
    module = ModuleType("page")
    # Dataclasses and FastAPI look their annotations up where a module would be.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    try:
        for block in blocks(page):
            await block.run(module.__dict__)
        assert asyncio.all_tasks() == {asyncio.current_task()}
    finally:
        await abandon(module.__dict__.values())


async def abandon(things: Iterable[object]) -> None:
    """Lets go of what a page that failed still holds, so that no other test suffers from it."""
    leftovers = asyncio.all_tasks() - {asyncio.current_task()}
    for task in leftovers:
        task.cancel()
    await asyncio.gather(*leftovers, return_exceptions=True)
    for thing in things:
        if isinstance(thing, asyncpg.Pool) or type(thing) is asyncpg.Connection:  # and not one of a pool
            thing.terminate()
        elif isinstance(thing, Server | Process):
            await thing.stop()


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_no_block_is_overlooked(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"```py|<!-- *py", text)) == len(list(blocks(page)))
