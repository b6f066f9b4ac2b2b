"""Log records as lines of JSON, for the standard library's `logging`."""

import json
import logging
from datetime import UTC, datetime
from typing import Any, Final

_OWN: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
"""What every record has; the rest are its fields."""


class JsonFormatter(logging.Formatter):
    """Makes one line of JSON of each record: time, level, logger, message and the record's fields.

    The fields are what was given as `extra`: `outbox` gives each of its events' values there, and never a payload or
    headers. What JSON has no word for is written as its `str`. An exception is a field as well, `exception`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line, without a newline."""
        fields = {name: value for name, value in record.__dict__.items() if name not in _OWN}
        line: dict[str, Any] = fields | {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, default=str, skipkeys=True)
