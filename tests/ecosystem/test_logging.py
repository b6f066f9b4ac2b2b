"""What an event says in the log, as lines of JSON and through structlog."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from uuid import uuid4

import asyncpg
import pytest
import structlog
from structlog.stdlib import ProcessorFormatter

from outbox import (
    BatchDelivered,
    DatabaseLost,
    DestinationDown,
    DestinationPartlyDown,
    DestinationUp,
    Event,
    Message,
    MessageDied,
    MessageFailed,
    Outbox,
    RelayAtWork,
    RelayFenced,
    RelaysDied,
    RelayStandsBy,
    RelayStarted,
    RelayStopped,
    SlotsOwned,
    WriterLate,
)
from outbox._log import entry_of, log  # noqa: TID251 -- each event, also those that take an accident
from outbox.instrumentation.logging import JsonFormatter
from tests.test_relay import Destination, Events, fails, running, write

PRIVATE = "not for a log"
MESSAGE = Message(PRIVATE, topic="orders", key="k", headers={"authorization": PRIVATE})
SECOND = timedelta(seconds=1.5)
EVENTS: list[Event] = [
    RelayStarted(),
    RelayStopped(3),
    BatchDelivered((MESSAGE,), 0.1),
    MessageFailed(MESSAGE, ValueError("why"), 2, SECOND),
    MessageDied(MESSAGE, ValueError("why"), 3),
    DestinationDown(OSError("away"), SECOND),
    DestinationPartlyDown((MESSAGE,), OSError("away"), SECOND),
    DestinationUp(),
    DatabaseLost(OSError("away"), SECOND),
    RelaysDied(1, 20),
    RelayFenced(),
    RelayStandsBy("key"),
    RelayAtWork(),
    SlotsOwned(32),
    WriterLate(4711, SECOND, passed_over=False),
    WriterLate(None, SECOND, passed_over=True),
]
ALWAYS = {"time", "level", "logger", "message", "outbox", "outbox_event"}


class Lines:
    """What the logger `outbox` wrote through a formatter."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self._stream = io.StringIO()
        self.handler = logging.StreamHandler(self._stream)
        self.handler.setFormatter(formatter)

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, self.text.splitlines())

    def of(self, event: str) -> dict[str, Any]:
        return next(line for line in self if line.get("outbox_event") == event)


@pytest.fixture
def lines(request: pytest.FixtureRequest) -> Iterator[Lines]:
    """Lines of JSON, or of the formatter that the test is parametrized with."""
    yield from capturing(getattr(request, "param", JsonFormatter()))


def capturing(formatter: logging.Formatter) -> Iterator[Lines]:
    logger, lines = logging.getLogger("outbox"), Lines(formatter)
    before = logger.level
    logger.addHandler(lines.handler)
    logger.setLevel(logging.DEBUG)
    yield lines
    logger.setLevel(before)
    logger.removeHandler(lines.handler)


async def test_a_relay_tells_in_json_what_became_of_a_message(
    pool: asyncpg.Pool[Any], outbox: Outbox, lines: Lines
) -> None:
    (message,) = await write(pool, outbox, PRIVATE, key="k", headers={"authorization": PRIVATE})
    events, destination = Events(), Destination(fails(PRIVATE, error=ValueError("no such customer")))
    async with running(outbox, pool, destination, hooks=[events]), asyncio.timeout(10):
        await events.next(MessageDied)
    names = [line["outbox_event"] for line in lines]
    assert names == ["RelayStarted", "MessageFailed", "MessageFailed", "MessageDied", "RelayStopped"]
    failed, died = lines.of("MessageFailed"), lines.of("MessageDied")
    about = {
        "outbox": f"{outbox.schema}.outbox",
        "message_id": str(message.id),
        "topic": "t",
        "key": "k",
        "position": 1,
        "error": "ValueError: no such customer",
        "error_type": "ValueError",
        "logger": "outbox",
    }
    assert about.items() <= failed.items()
    assert about.items() <= died.items()
    assert (failed["level"], failed["attempts"], failed["delay_seconds"]) == ("warning", 1, 0.01)
    assert (died["level"], died["attempts"]) == ("error", 3)
    assert died["message"].startswith(f"Message(id={message.id}")
    assert datetime.now(UTC) - datetime.fromisoformat(died["time"]) < timedelta(seconds=30)
    assert PRIVATE not in lines.text


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_each_event_has_a_level_a_text_and_fields_of_plain_values(event: Event, lines: Lines) -> None:
    log(event, "public.outbox")
    if isinstance(event, BatchDelivered):  # which only a hook hears of
        assert not lines.text
        return
    (line,) = lines
    entry = entry_of(event)
    assert entry
    assert line["level"] == logging.getLevelName(entry.level).lower()
    assert (line["outbox"], line["outbox_event"]) == ("public.outbox", type(event).__name__)
    assert {name: line[name] for name in line.keys() - ALWAYS} == entry.fields
    assert PRIVATE not in lines.text


def test_no_event_is_forgotten() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(Event))


@pytest.mark.parametrize(
    "lines",
    [
        ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.ExtraAdder()],
            processors=[ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer()],
        )
    ],
    indirect=True,
)
@pytest.mark.parametrize("event", EVENTS[3:], ids=lambda event: type(event).__name__)
def test_structlog_renders_the_fields_beside_the_text(event: Event, lines: Lines) -> None:
    log(event, "public.outbox")
    (line,) = lines
    entry = entry_of(event)
    assert entry
    assert line == {
        "event": entry.text % entry.arguments,
        "level": logging.getLevelName(entry.level).lower(),
        "outbox": "public.outbox",
        "outbox_event": type(event).__name__,
        **entry.fields,
    }


def test_a_level_that_is_off_costs_no_record(lines: Lines) -> None:
    logging.getLogger("outbox").setLevel(logging.ERROR)
    for event in EVENTS:
        log(event, "public.outbox")
    assert [line["outbox_event"] for line in lines] == ["MessageDied"]


def formatted(**fields: Any) -> dict[str, Any]:
    record = logging.makeLogRecord({"name": "own", "msg": "%s of %d", "args": ("one", 2), "levelno": 20, **fields})
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line: dict[str, Any] = json.loads(text)
    return line


def test_the_formatter_takes_what_json_has_no_word_for() -> None:
    identifier = uuid4()
    line = formatted(which=identifier, since=timedelta(seconds=1), bad="\ud800", lines="a\nb", deep={"x": {1}})
    assert line["message"] == "one of 2"
    assert (line["which"], line["since"], line["deep"]) == (str(identifier), "0:00:01", {"x": "{1}"})
    assert (line["bad"], line["lines"]) == ("\ud800", "a\nb")


def test_the_formatter_keeps_its_own_names_and_tells_an_exception() -> None:
    with pytest.raises(ValueError, match="why") as raised:
        int("why")
    exc_info = (raised.type, raised.value, raised.tb)
    line = formatted(exc_info=exc_info, stack_info="Stack", level="mine", logger="mine")
    assert (line["logger"], line["stack"]) == ("own", "Stack")
    assert line["level"] != "mine"
    assert line["exception"].splitlines()[-1].startswith("ValueError: ")
