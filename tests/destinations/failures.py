"""What became of a batch, message by message."""

from uuid import UUID

from outbox import DestinationUnavailableError, Dispatcher, Message, PartialDispatchError


async def failures_of(destination: Dispatcher, *batch: Message) -> dict[UUID, BaseException]:
    """Dispatches, and returns the error of each message that was not accepted, by its id."""
    try:
        await destination.dispatch(*batch)
    except PartialDispatchError as error:
        return error.failures
    except DestinationUnavailableError as error:
        return {message.id: error for message in batch}
    return {}
