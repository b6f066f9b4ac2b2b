"""How a payload becomes bytes and comes back: the `Codec` Protocol, and `JsonCodec` on orjson."""

import dataclasses
import enum
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, time
from typing import Any, Protocol, Union, get_args, get_origin, get_type_hints
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
    can be mapped. NaN and the infinities are refused, since JSON has no word for them.

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
        self._from_document = {name: _converter(cls) for name, cls in (types or {}).items()}
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
        if b"null" in body and (path := _non_finite(payload)):
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
            return dump(mode="json")
        if hasattr(value, "__struct_fields__"):
            return sys.modules["msgspec"].to_builtins(value)
        if self._default:
            return self._default(value)
        raise TypeError(f"Type is not JSON serializable: {type(value).__name__}")

    def _explain(self, payload: Any, error: Exception) -> str:
        # orjson does not say where it failed, so walk to the smallest part that fails by itself.
        path, value, depth = "$", payload, 0
        while True:
            for step, child in _children(value):
                try:
                    orjson.dumps(child, self._plain, self._options)
                except (TypeError, ValueError, RecursionError) as inner:
                    path, value, error = path + step, child, inner
                    break
            else:
                return f"{path} ({type(value).__name__}) has no JSON form: {error}"
            depth += 1
            if depth > _DEEPEST_PATH:
                return f"{path[:80]}… is nested too deeply, or contains itself"


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{name!r}]", child) for name, child in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"[{index}]", child) for index, child in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value))


def _non_finite(value: Any, path: str = "$") -> str | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else path
    return next((found for step, child in _children(value) if (found := _non_finite(child, path + step))), None)


def _converter(hint: Any) -> _Convert:  # noqa: PLR0911 -- one return for each kind of type is the clearest form
    """Builds the function from a JSON document to a value of this type, once for each mapped type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (Any, object, None, types.NoneType, bool, int, float, str, dict, list):
        return float if hint is float else _same
    if hint in (datetime, date, time):
        return hint.fromisoformat  # type: ignore[no-any-return]  # a classmethod of a type known by value only
    if origin in (Union, types.UnionType):
        return _optional(hint, arguments)
    if origin in (list, set, frozenset, tuple) or hint in (tuple, set, frozenset):
        return _sequence(origin or hint, arguments)
    if origin is dict or origin is Mapping:
        value = _converter(arguments[1])
        return lambda document: {name: value(child) for name, child in document.items()}
    if isinstance(hint, type):
        return _class(hint)
    if origin is not None and str(origin) == "typing.Literal":
        return _same
    raise CodecError(_unsupported(hint))


def _same(document: Any) -> Any:
    return document


def _optional(hint: Any, arguments: tuple[Any, ...]) -> _Convert:
    others = [argument for argument in arguments if argument is not types.NoneType]
    converters = [_converter(argument) for argument in others]
    if len(converters) == 1:
        only = converters[0]
        return lambda document: None if document is None else only(document)
    if all(converter is _same for converter in converters):
        return _same
    raise CodecError(_unsupported(hint))


def _sequence(kind: Any, arguments: tuple[Any, ...]) -> _Convert:
    if not arguments:
        return kind  # type: ignore[no-any-return]  # list, tuple, set: a type called as a function
    if kind is tuple and arguments[-1] is not Ellipsis:
        items = [_converter(argument) for argument in arguments]
        return lambda document: tuple(item(child) for item, child in zip(items, document, strict=True))
    item = _converter(arguments[0])
    return lambda document: kind(item(child) for child in document)


def _class(cls: type) -> _Convert:
    if validate := getattr(cls, "model_validate", None):
        return validate  # type: ignore[no-any-return]  # pydantic's, present only when it is installed
    if hasattr(cls, "__struct_fields__"):
        convert = sys.modules["msgspec"].convert
        return lambda document: convert(document, cls)
    if issubclass(cls, UUID | enum.Enum):
        return cls
    if dataclasses.is_dataclass(cls):
        return _dataclass(cls)
    raise CodecError(_unsupported(cls))


def _dataclass(cls: type) -> _Convert:
    hints = get_type_hints(cls)
    fields = {field.name: _converter(hints[field.name]) for field in dataclasses.fields(cls) if field.init}
    # A field that is not known here was written by a newer version of the service: it is left aside.
    return lambda document: cls(**{name: fields[name](child) for name, child in document.items() if name in fields})


def _unsupported(hint: Any) -> str:
    return (
        f"cannot decode into {getattr(hint, '__name__', hint)}: map a dataclass of JSON's own types, dates, UUIDs, "
        "enums and other dataclasses, or a pydantic model or msgspec Struct for anything richer"
    )
