"""What a destination does with the answers to its batch."""

from collections.abc import Callable, Iterable, Sequence
from uuid import UUID

from outbox._errors import PartialDispatchError
from outbox._message import Message

Sort = Callable[[BaseException], BaseException]
"""Makes of a client's error what the relay understands: rejected, unavailable, or the error itself."""


def require_accepted(messages: Sequence[Message], answers: Iterable[object], sort: Sort) -> None:
    """Raises a `PartialDispatchError` of the messages whose answer is an error.

    Args:
        messages: The batch.
        answers: For each message what its publishing returned, or raised.
        sort: Applied to each error once: one that stands for several messages makes one again, so that the relay
            blames none of them.
    """
    failures: dict[UUID, BaseException] = {}
    made: dict[int, BaseException] = {}
    for message, answer in zip(messages, list(answers), strict=True):
        if isinstance(answer, BaseException):
            if id(answer) not in made:
                made[id(answer)] = sort(answer)
            failures[message.id] = made[id(answer)]
    if failures:
        raise PartialDispatchError(failures)


def caused(error: BaseException, cause: BaseException) -> BaseException:
    """Returns the error with its cause, for one that is reported instead of raised."""
    error.__cause__ = cause
    return error
