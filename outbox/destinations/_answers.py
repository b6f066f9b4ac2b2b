"""What a destination does with the answers to its batch."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar
from uuid import UUID

from outbox._errors import PartialDispatchError, RejectedError
from outbox._message import Message

T = TypeVar("T")

Sort = Callable[[BaseException], BaseException]
"""Makes of a client's error what the relay understands: rejected, unavailable, or the error itself."""


async def send_fitting(
    messages: Sequence[Message],
    make: Callable[[Message], T],
    send: Callable[[Sequence[T]], Awaitable[Iterable[object]]],
    sort: Sort,
) -> None:
    """Sends what is made of the messages, without those that are rejected before, and requires that it was accepted.

    Args:
        messages: The batch.
        make: Makes of a message what is sent, or raises `RejectedError`.
        send: Returns for each what its publishing returned, or raised; not called for nothing.
        sort: As for `require_accepted`.
    """
    made: list[T | RejectedError] = []
    for message in messages:
        try:
            made.append(make(message))
        except RejectedError as error:
            made.append(error)
    fitting = [one for one in made if not isinstance(one, RejectedError)]
    answers = iter(await send(fitting) if fitting else ())
    require_accepted(messages, [one if isinstance(one, RejectedError) else next(answers) for one in made], sort)


def require_body_within(message: Message, most: int | None) -> None:
    """Raises `RejectedError` for a body of more bytes than that; None lets all pass."""
    if most is not None and len(message.body) > most:
        raise RejectedError(f"message {message.id}: a body of {len(message.body)} bytes is beyond {most}")


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
