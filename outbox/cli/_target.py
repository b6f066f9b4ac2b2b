"""The relay that MODULE:ATTRIBUTE names."""

import inspect
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module
from typing import Any

from outbox._relay import Relay
from outbox.cli._failures import fail


@asynccontextmanager
async def relay_of(target: str) -> AsyncIterator[Relay]:
    """Finds the relay, or has it made in the running event loop, for the length of the block."""
    found = load(target)
    if callable(found):
        _require_no_arguments(target, found)
        found = found()
    if inspect.isasyncgen(found):
        fail(f"{target} is an async generator: decorate the function with contextlib.asynccontextmanager")
    if inspect.isawaitable(found):
        found = await found
    if isinstance(found, AbstractAsyncContextManager):
        async with found as inner:
            yield await _checked(target, inner)
    else:
        yield await _checked(target, found)


def load(target: str) -> Any:
    """Imports the module and returns its attribute."""
    name, _, attribute = target.partition(":")
    if not attribute or not all(part.isidentifier() for part in name.split(".")):
        fail(f"{target!r} is not MODULE:ATTRIBUTE, as in shop.worker:relay")
    here = os.getcwd()  # noqa: PTH109 -- an entry of sys.path is a string
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # one that the module itself imports
        fail(f"there is no module {error.name!r}: it was looked for in {here}, and where Python looks")
    for part in attribute.split("."):
        if not hasattr(found, part):
            fail(f"the module {name!r} has no attribute {attribute!r}")
        found = getattr(found, part)
    return found


def _require_no_arguments(target: str, function: Any) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        fail(f"{target} cannot be called without arguments: {error}")
    except ValueError:
        pass  # a builtin, which does not tell


async def _checked(target: str, found: object) -> Relay:
    if not isinstance(found, Relay):
        fail(f"{target} is, or gives, a {type(found).__name__}, not a Relay")
    _ = await found._settings.pool  # which may have been made where nobody could wait for it
    return found
