"""This library without one of its tricks, so that there is a figure of what each of them brings."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

from outbox import _claims, _session, _worker  # noqa: TID251 -- they are what is taken away
from outbox._competing import Competing  # noqa: TID251
from outbox._holdings import Holdings  # noqa: TID251
from outbox._queries import Queries  # noqa: TID251

_begin, _init = Queries.begin, Queries.__init__


@dataclass(frozen=True)
class Without:
    """What is done instead."""

    instead: str
    patches: Callable[[], list[AbstractContextManager[Any]]]
    decodes: bool = False
    """Whether the destination decodes each payload."""


def _begins_without(*parts: str) -> AbstractContextManager[Any]:
    def begin(milliseconds: int) -> str:
        text = _begin(milliseconds)
        for part in parts:
            if part not in text:
                raise LookupError(f"the trick is gone: there is no {part!r} in {text!r}")
            text = text.replace(part, "")
        return text

    return patch.object(Queries, "begin", staticmethod(begin))


def _queries_without(part: str, by: str) -> AbstractContextManager[Any]:
    def init(self: Queries, *arguments: Any, **options: Any) -> None:
        _init(self, *arguments, **options)
        changed = {name: text for name, text in vars(self).items() if isinstance(text, str) and part in text}
        if not changed:
            raise LookupError(f"the trick is gone: no query has {part!r}")
        for name, text in changed.items():
            setattr(self, name, text.replace(part, by))

    return patch.object(Queries, "__init__", init)


DRAINING: Final[Mapping[str, Without]] = {
    "one batch a claim": Without(
        "each claim is for one batch, instead of as many as half of what a relay may hold",
        lambda: [patch.object(_worker, "Competing", _OneBatch)],
    ),
    "one after another": Without(
        "it claims when nothing is left in its hands, instead of while the last half of it is delivered",
        lambda: [patch.object(Holdings, "is_half_full", property(lambda self: self._messages > 0))],
    ),
    "settled in between": Without(
        "what was delivered is settled before a claim, instead of beside it on the other connection",
        lambda: [patch.object(Competing, "settles_beside", property(lambda _: False))],
    ),
    "own BEGIN": Without(
        "each transaction is opened by a round trip of its own, instead of by the last COMMIT",
        lambda: [patch.object(_session, "READY_SECONDS", -1.0)],
    ),
    "durable": Without(
        "the relay waits for the disk at each COMMIT, instead of `synchronous_commit=off`",
        lambda: [_begins_without("SET LOCAL synchronous_commit = off;")],
    ),
    "free plans": Without(
        "the planner is left alone, instead of kept to the primary key and to one plan for all arguments",
        lambda: [
            _begins_without(
                "SET LOCAL enable_seqscan = off; SET LOCAL enable_sort = off; SET LOCAL enable_bitmapscan = off;",
                "SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL jit_above_cost = -1;",
            )
        ],
    ),
    "times decoded": Without(
        "the driver makes a datetime of each message's time, instead of the bytes being kept until it is asked for",
        lambda: [_queries_without("timestamptz_send(recorded_at) AS recorded_at", "recorded_at")],
    ),
    "arrays": Without(
        "positions are sent as arrays, which the driver encodes one by one, instead of as one text",
        lambda: [patch.object(_claims, "listed", list), _queries_without("::text::bigint[]", "::bigint[]")],
    ),
    "payloads decoded": Without(
        "the destination asks for each payload, instead of forwarding the bytes of the body", list, decodes=True
    ),
}
"""What makes a drain fast, by the names of variants."""

IN_HAND: Final = ("one batch a claim", "one after another", "settled in between")
"""Those of them that keep a slow destination at work."""

TRAFFIC: Final[Mapping[str, Without]] = {
    "no gathering": Without(
        "a claim follows the last one at once, instead of waiting for more up to half a millisecond for each message",
        lambda: [patch.object(_worker, "_GATHERING", 0.0)],
    ),
    "settled at once": Without(
        "what was delivered is settled at once, instead of with all of the next 20 ms",
        lambda: [patch.object(_worker, "_SETTLE_INTERVAL", 0.0)],
    ),
}
"""What spares the writers, while a relay delivers what comes."""

TRICKS: Final[Mapping[str, Without]] = {**DRAINING, **TRAFFIC}


class _OneBatch(Competing):
    def __init__(self, *arguments: Any, batch_size: int, concurrency: int, **options: Any) -> None:
        del concurrency
        super().__init__(*arguments, batch_size=batch_size, concurrency=1, **options)
        self._holdings.half = batch_size
