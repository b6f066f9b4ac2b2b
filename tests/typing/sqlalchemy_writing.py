"""A service on SQLAlchemy that writes messages, as its author types it; mypy checks it, nobody runs it."""

from typing import assert_type

from sqlalchemy import MetaData, Table
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session

from outbox import Dispatcher, Inbox, Message, Outbox
from outbox.sqlalchemy import SQLAlchemyDispatcher, inbox_tables, outbox_tables


class OwnSession(AsyncSession):
    """A session of the service's own class."""


async def each_of_these_gives_a_dispatcher(
    session: AsyncSession, own: OwnSession, scoped: async_scoped_session[OwnSession], connection: AsyncConnection
) -> None:
    for each in (session, own, scoped, connection):
        dispatcher: Dispatcher = SQLAlchemyDispatcher(
            each, Outbox(), decorators=[lambda message: message.with_header("a", "b")]
        )
        await dispatcher.dispatch(Message(1, topic="t"))


def these_do_not(engine: AsyncEngine, session: Session) -> None:
    SQLAlchemyDispatcher(engine)  # type: ignore[arg-type]
    SQLAlchemyDispatcher(session)  # type: ignore[arg-type]  # not asyncio's
    SQLAlchemyDispatcher(session=1)  # type: ignore[arg-type]
    SQLAlchemyDispatcher()  # type: ignore[call-arg]


def the_tables_come_by_what_they_hold(metadata: MetaData) -> None:
    assert_type(outbox_tables(Outbox(), metadata)["dead"], Table)
    assert_type(inbox_tables(Inbox(), metadata)["inbox"], Table)
    outbox_tables(Inbox(), metadata)  # type: ignore[arg-type]
    inbox_tables(Outbox(), metadata)  # type: ignore[arg-type]
