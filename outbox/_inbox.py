"""The consumer's side: `Inbox`, which remembers what was seen, so that a duplicate has no second effect."""

from datetime import timedelta
from typing import Final
from uuid import UUID

from outbox._dispatcher import require_transaction
from outbox._message import Message
from outbox._outbox import Connection, Tables, affected, scripts_in
from outbox._queries import InboxQueries

_MIGRATIONS: Final = scripts_in("migrations", "inbox")
_INSIDE: Final = "Accept inside `async with connection.transaction():`, together with what the message brings about"


class Inbox(Tables):
    """Remembers which messages a consumer has accepted, in the transaction of what they bring about.

    A relay and a broker deliver at least once. A consumer that asks here first, and works only on what is fresh,
    does the work of each message exactly once: the id and the work commit together, or neither does.

    One table is one consumer. Two that must each see every message need two tables, since what one of them has
    accepted is a duplicate for whoever shares its table. It holds no connection: an object may be used by any number
    of tasks at once.

    Args:
        table: The table's name, at most 49 bytes; it is quoted, so any name will do. Another one beside it has this
            name and the suffix _version. Not that of an outbox of the same schema.
        schema: The schema's name, quoted too.
        longest_retry: How long after its first delivery a message may come again. Nothing younger can be cleaned up.
            An hour is what a relay with the default back-off takes for all its attempts, rounded up. What comes on
            top is yours to add: how long the broker keeps messages, and how late you redrive dead letters.

    Raises:
        ValueError: When a name cannot be an identifier, or `longest_retry` is not longer than zero.
    """

    def __init__(
        self, table: str = "inbox", *, schema: str = "public", longest_retry: timedelta = timedelta(hours=1)
    ) -> None:
        if longest_retry <= timedelta():
            raise ValueError(f"longest_retry must be longer than zero, not {longest_retry!r}")
        self.longest_retry = longest_retry
        self._queries = InboxQueries(table, schema)
        super().__init__(table, schema, self._queries.version, self._queries.names, _MIGRATIONS)

    async def accept(self, connection: Connection, message: Message | UUID) -> bool:
        """Returns True when this consumer sees the message for the first time, and False for a duplicate.

        It counts when your transaction commits; rolled back, also to a savepoint, the message is as good as never
        seen. While another transaction that accepted the same message is open, this waits: for False when that one
        commits, for True when it rolls back. `lock_timeout` limits the wait.

        Under REPEATABLE READ and SERIALIZABLE a message that was accepted after your transaction took its snapshot
        is an error, since the snapshot cannot show it: an `OutboxError` caused by `asyncpg.SerializationError`. Roll
        back and run the transaction again, or let the broker deliver again; the answer is False then.

        Args:
            connection: An asyncpg connection, or one acquired from a pool, with an open transaction.
            message: The message, or its id.

        Raises:
            NotInTransactionError: When no transaction is open; nothing was written.
            SchemaError: When the table does not exist.
            OutboxError: When the database refuses, with the driver's error as its cause.
        """
        identity = message.id if isinstance(message, Message) else message
        if not isinstance(identity, UUID):
            raise TypeError(f"only a Message or its id, a uuid.UUID, can be accepted, not {type(message).__name__}")
        require_transaction(connection, identity, "accepted", _INSIDE)
        with self._surfacing(f"cannot accept message {identity}"):
            return await connection.fetchval(self._queries.accept, identity) is not None

    async def cleanup(self, connection: Connection, older_than: timedelta, limit: int) -> int:
        """Forgets up to `limit` messages that were accepted longer than this ago; returns how many.

        A duplicate of what was forgotten is taken for a fresh message.

        Raises:
            ValueError: When `older_than` is shorter than the longest retry: a duplicate could still come.
            SchemaError: When the table does not exist.
            OutboxError: When the database refuses, with the driver's error as its cause.
        """
        if older_than < self.longest_retry:
            raise ValueError(
                f"{self!r}: older_than is {older_than}, but a message may come again for {self.longest_retry}: what is "
                "forgotten before would have its effect twice. Keep for longer, or tell the inbox another longest_retry"
            )
        with self._surfacing("cannot clean up"):
            return affected(await connection.execute(self._queries.cleanup, older_than, limit))
