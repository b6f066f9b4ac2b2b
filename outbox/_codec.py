"""How a payload becomes bytes and comes back: the `Codec` Protocol, and `JsonCodec` on orjson."""

import dataclasses
import enum
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import date, datetime, time
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints
from uuid import UUID

import orjson

from outbox._errors import CodecError

_Convert = Callable[[Any], Any]
_DEEPEST_PATH = 100
"""How far the search for a value without a JSON form goes down: a structure may contain itself."""


class Codec(Protocol):
    """Turns a payload into bytes and back.

    The name that `encode` returns travels in the message's header `type` and comes back to `decode`.
    Both raise `CodecError` for what they cannot do.
    """

    def encode(self, payload: Any) -> tuple[str | None, bytes]:
        """Returns the name of the payload's type, if it has one, and its bytes."""
        ...

    def decode(self, body: bytes, type_name: str | None) -> Any:
        """Returns the payload that was encoded under this type name."""
        ...


class JsonCodec:
    """JSON by orjson, with type names that you map, never class paths.

    A payload of a mapped type is decoded back into that type; every other payload, and every unknown
    name, is plain JSON: dicts, lists, strings, numbers. Dataclasses, pydantic models and msgspec structs
    can be mapped; pydantic and msgspec check what they decode, a dataclass takes its fields as they come. NaN and
    the infinities are refused, since JSON has no word for them.

    Args:
        types: The type of each name. Several names may lead to one type (old names after a rename);
            the first of them is the one written.
        upcasters: For a name, a function from the decoded document to the document its type expects today.
        options: orjson's `OPT_*` bits, or-ed.
        default: orjson's `default`: what to do with an object it does not know.

    Raises:
        CodecError: When a mapped type is none that can be decoded.
    """

    def __init__(
        self,
        types: Mapping[str, type] | None = None,
        *,
        upcasters: Mapping[str, Callable[[Any], Any]] | None = None,
        options: int = 0,
        default: Callable[[Any], Any] | None = None,
    ) -> None:
        known: dict[Any, _Convert] = {}
        self._from_document = {name: _converter(cls, known) for name, cls in (types or {}).items()}
        self._names: dict[type, str] = {}
        for name, cls in (types or {}).items():
            self._names.setdefault(cls, name)
        self._upcasters = dict(upcasters or {})
        self._options = options
        self._default = default

    def encode(self, payload: Any) -> tuple[str | None, bytes]:
        """Encodes the payload; raises `CodecError` with the path of the first value that has no JSON form."""
        try:
            body = orjson.dumps(payload, self._plain, self._options)
        except (TypeError, ValueError, RecursionError) as error:
            raise CodecError(self._explain(payload, error)) from error
        # orjson writes null for what is not finite: only where there is a null it is worth to look.
        if b"null" in body and (path := self._not_finite(payload)):
            raise CodecError(f"{path} is not finite: JSON cannot say NaN or infinity, send a string or None")
        return self._names.get(type(payload)), body

    def decode(self, body: bytes, type_name: str | None) -> Any:
        """Decodes the body; raises `CodecError` when it is no JSON or does not fit its mapped type."""
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise CodecError(f"the body is not JSON: {error}") from error
        if type_name is None:
            return document
        try:
            if upcaster := self._upcasters.get(type_name):
                document = upcaster(document)
            convert = self._from_document.get(type_name)
            return convert(document) if convert else document
        except Exception as error:
            raise CodecError(f"the document does not fit the type mapped to {type_name!r}: {error}") from error

    def _plain(self, value: Any) -> Any:
        if dump := getattr(value, "model_dump", None):
            return dump(mode="json", by_alias=True)
        if hasattr(value, "__struct_fields__"):
            return sys.modules["msgspec"].to_builtins(value, str_keys=True)
        if self._default:
            return self._default(value)
        raise TypeError(f"Type is not JSON serializable: {type(value).__name__}")

    def _explain(self, payload: Any, error: Exception) -> str:
        # orjson does not say where it failed, so walk to the smallest part that fails by itself.
        path, value = "$", payload
        for _ in range(_DEEPEST_PATH):
            for step, child in self._children(value):
                try:
                    orjson.dumps(child, self._plain, self._options)
                except (TypeError, ValueError, RecursionError) as inner:
                    path, value, error = path + step, child, inner
                    break
            else:
                return f"{path} ({type(value).__name__}) has no JSON form: {error}"
        return f"{path[:80]}… is nested too deeply, or contains itself"

    def _not_finite(self, value: Any, path: str = "$") -> str | None:
        if isinstance(value, float):
            return None if math.isfinite(value) else path
        children = self._children(value)
        return next((found for step, child in children if (found := self._not_finite(child, path + step))), None)

    def _children(self, value: Any) -> Iterator[tuple[str, Any]]:
        """What a value consists of, each with its step of the path."""
        if isinstance(value, dict):
            yield from ((f"[{name!r}]", child) for name, child in value.items())
        elif isinstance(value, list | tuple):
            yield from ((f"[{index}]", child) for index, child in enumerate(value))
        elif isinstance(value, type | str | bytes | int | float | None | date | time | UUID):
            return
        elif dataclasses.is_dataclass(value):
            yield from ((f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value))
        elif isinstance(value, enum.Enum):
            yield ".value", value.value
        elif fields := getattr(type(value), "model_fields", None) or getattr(value, "__struct_fields__", None):
            yield from ((f".{name}", getattr(value, name)) for name in fields)
        elif self._default:
            with suppress(Exception):  # what it raises is told by the encoding itself
                yield "", self._default(value)


def _converter(hint: Any, known: dict[Any, _Convert]) -> _Convert:
    """Builds the function from a JSON document to a value of this type, once for each mapped type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (Any, object, None, types.NoneType, bool, int, float, str, dict, list) or origin is Literal:
        return float if hint is float else _same
    if origin in (Union, types.UnionType):
        return _optional(hint, arguments, known)
    if origin in _SEQUENCES or hint in _SEQUENCES:
        return _sequence(origin or hint, arguments, known)
    if origin in (dict, Mapping):
        return _mapping(_key(arguments[0]), _converter(arguments[1], known))
    if isinstance(hint, type):
        return _class(hint, known)
    raise CodecError(_unsupported(hint))


_SEQUENCES = (list, set, frozenset, tuple)


def _same(document: Any) -> Any:
    return document


def _optional(hint: Any, arguments: tuple[Any, ...], known: dict[Any, _Convert]) -> _Convert:
    others = [argument for argument in arguments if argument is not types.NoneType]
    if all(argument in (bool, int, float, str) for argument in others):
        return _same
    if len(others) > 1:
        raise CodecError(_unsupported(hint))
    only = _converter(others[0], known)
    return lambda document: None if document is None else only(document)


def _sequence(kind: Any, arguments: tuple[Any, ...], known: dict[Any, _Convert]) -> _Convert:
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        items = [_converter(argument, known) for argument in arguments]
        return lambda document: tuple(item(child) for item, child in zip(items, _expect(list, document), strict=True))
    item = _converter(arguments[0], known) if arguments else _same
    return lambda document: kind(item(child) for child in _expect(list, document))


def _mapping(key: _Convert, value: _Convert) -> _Convert:
    return lambda document: {key(name): value(child) for name, child in _expect(dict, document).items()}


def _key(hint: Any) -> _Convert:
    # In JSON every key is a text; these are the types of keys that orjson's OPT_NON_STR_KEYS writes, but for float.
    return int if hint is int else _converter(hint, {})


def _expect(kind: type, document: Any) -> Any:
    if not isinstance(document, kind):
        raise TypeError(f"a JSON {'array' if kind is list else 'object'} was expected, not {document!r:.40}")
    return document


def _class(cls: Any, known: dict[Any, _Convert]) -> _Convert:
    if hasattr(cls, "model_validate_json"):
        return lambda document: cls.model_validate_json(orjson.dumps(document))
    if hasattr(cls, "__struct_fields__"):
        decode = sys.modules["msgspec"].json.decode
        return lambda document: decode(orjson.dumps(document), type=cls)
    if cls in (datetime, date, time):
        return cls.fromisoformat  # type: ignore[no-any-return]  # a classmethod of a type known by value only
    if issubclass(cls, UUID | enum.Enum):
        return cls  # type: ignore[no-any-return]  # a class called as a function
    if dataclasses.is_dataclass(cls):
        return _dataclass(cls, known)
    raise CodecError(_unsupported(cls))


def _dataclass(cls: Any, known: dict[Any, _Convert]) -> _Convert:
    if cls in known:
        return known[cls]
    fields: dict[str, _Convert] = {}

    def convert(document: Any) -> Any:
        # A field that is not known here was written by a newer version of the service: it is left aside.
        return cls(**{name: fields[name](child) for name, child in _expect(dict, document).items() if name in fields})

    known[cls] = convert  # before its fields are looked at: one of them may be of this same type
    try:
        hints = get_type_hints(cls)
    except (NameError, TypeError) as error:
        raise CodecError(f"the annotations of {cls.__qualname__} cannot be resolved: {error}") from error
    fields |= {field.name: _converter(hints[field.name], known) for field in dataclasses.fields(cls) if field.init}
    return convert


def _unsupported(hint: Any) -> str:
    return (
        f"cannot decode into {getattr(hint, '__name__', hint)}: map a dataclass of JSON's own types, dates, UUIDs, "
        "enums and other dataclasses, or a pydantic model or msgspec Struct for anything richer"
    )
