"""A web service that writes an order and its message in the transaction of the request.

    DSN=postgresql://… uvicorn fastapi_app:app
    python fastapi_app.py

Without a DSN it brings a PostgreSQL of its own. The relay lives as long as the application; with several workers
each runs one, and they share the messages.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated
from uuid import UUID, uuid4

import anyio
import asyncpg
import uvicorn
from asyncpg.pool import PoolConnectionProxy
from fastapi import Depends, FastAPI, Request, status
from fastapi.responses import JSONResponse
from pydantic import BaseModel, PositiveInt

from outbox import Dispatcher, HandlerDispatcher, JsonCodec, Message, Outbox, OutboxDispatcher, Relay, embedded

TABLES = """
    CREATE TABLE IF NOT EXISTS stock (item text PRIMARY KEY, quantity integer NOT NULL CHECK (quantity >= 0));
    INSERT INTO stock VALUES ('tea', 10) ON CONFLICT DO NOTHING;
    CREATE TABLE IF NOT EXISTS orders (id uuid PRIMARY KEY, item text REFERENCES stock, quantity integer NOT NULL)
"""


class Order(BaseModel):
    """What a customer asks for."""

    item: str
    quantity: PositiveInt


@dataclass(frozen=True, slots=True)
class OrderPlaced:
    """What the others are told."""

    order_id: UUID
    item: str
    quantity: int


outbox = Outbox(codec=JsonCodec({"OrderPlaced": OrderPlaced}))

# --- the application's life: database, pool, relay -------------------------------------------------------


@asynccontextmanager
async def database() -> AsyncIterator[str]:
    """The DSN of the environment, or else that of a PostgreSQL for the length of the block."""
    if dsn := os.environ.get("DSN"):
        yield dsn
    else:
        async with embedded.postgres() as dsn:
            yield dsn


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Starts what the requests need, and stops it in the opposite order after the last of them."""
    # The relay keeps two connections of the pool; the others are for the requests.
    async with database() as dsn, asyncpg.create_pool(dsn, min_size=2, max_size=10) as pool:
        async with pool.acquire() as connection, connection.transaction():
            await outbox.migrate(connection)  # under a lock, until the commit: several workers may start at once
            await connection.execute(TABLES)
        app.state.pool, app.state.delivered = pool, []

        async def deliver(message: Message) -> None:
            """Stands for a broker."""
            app.state.delivered.append(message.payload)
            print(f"delivered {message.payload}", flush=True)

        relay = Relay(outbox, pool, HandlerDispatcher(deliver))
        async with anyio.create_task_group() as tasks:
            await tasks.start(relay.run)  # returns when it is ready
            yield
            await relay.stop()


app = FastAPI(lifespan=lifespan)

# --- a request's dependencies ----------------------------------------------------------------------------


async def begin(request: Request) -> AsyncIterator[PoolConnectionProxy]:
    """A connection in a transaction, committed when the endpoint returns and rolled back when it raises."""
    async with request.app.state.pool.acquire() as connection, connection.transaction():
        yield connection


# By default FastAPI ends a dependency after the response was sent: the client would read "201 Created" before the
# commit, and still have it in hand when the commit fails. With the scope "function" the dependency ends, and so the
# transaction commits, after the endpoint and before the response.
Transaction = Annotated[PoolConnectionProxy, Depends(begin, scope="function")]


def dispatcher(connection: Transaction) -> Dispatcher:
    """Writes into the outbox, in the request's transaction: within one request, all get the same connection."""
    return OutboxDispatcher(connection, outbox)


# --- the endpoints ---------------------------------------------------------------------------------------


@app.post("/orders", status_code=status.HTTP_201_CREATED)
async def place_order(
    order: Order, connection: Transaction, dispatcher: Annotated[Dispatcher, Depends(dispatcher)]
) -> OrderPlaced:
    """Writes the order and its message, and takes the goods from the stock: all of it, or nothing."""
    placed = OrderPlaced(uuid4(), order.item, order.quantity)
    await connection.execute("INSERT INTO orders VALUES ($1, $2, $3)", placed.order_id, placed.item, placed.quantity)
    await dispatcher.dispatch(Message(placed, topic="orders.placed", key=str(placed.order_id)))
    # Its CHECK is the last word on whether there is enough; when it fails, the order and the message go with it.
    await connection.execute("UPDATE stock SET quantity = quantity - $2 WHERE item = $1", placed.item, placed.quantity)
    return placed


@app.exception_handler(asyncpg.IntegrityConstraintViolationError)
async def refused(_request: Request, _error: Exception) -> JSONResponse:
    """Answers for a transaction that broke a rule of the database, and is rolled back by now."""
    return JSONResponse({"detail": "no such item, or not enough of it"}, status.HTTP_409_CONFLICT)


@app.get("/orders")
async def orders(connection: Transaction) -> list[UUID]:
    """Which orders there are."""
    return [row["id"] for row in await connection.fetch("SELECT id FROM orders")]


@app.get("/delivered")
async def delivered(request: Request) -> list[OrderPlaced]:
    """What the relay of this process has delivered so far."""
    return list(request.app.state.delivered)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
