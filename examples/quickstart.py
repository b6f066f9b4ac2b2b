"""The whole of it: an order and its message in one transaction, and a relay that delivers what was committed."""

import asyncio
from dataclasses import dataclass

import asyncpg

from outbox import HandlerDispatcher, JsonCodec, Message, Outbox, OutboxDispatcher, Relay, embedded


@dataclass(frozen=True, slots=True)
class OrderPlaced:
    """What the others are told; its name on the wire is the one mapped below."""

    number: int
    item: str


outbox = Outbox(codec=JsonCodec({"OrderPlaced": OrderPlaced}))


async def place_order(pool: asyncpg.Pool, order: OrderPlaced, *, in_stock: bool) -> None:
    """Writes the row and the message: after the commit both are there, after a rollback neither."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("INSERT INTO orders VALUES ($1, $2)", order.number, order.item)
        await OutboxDispatcher(connection, outbox).dispatch(Message(order, topic="orders"))
        if not in_stock:
            raise LookupError(f"no {order.item} left")


async def handle(message: Message) -> None:
    """Stands for a broker, or for whoever else wants to know."""
    print(f"delivered:   {message.payload}")


async def main() -> None:
    """Places two orders, one of which fails, and relays."""
    async with embedded.postgres() as dsn, asyncpg.create_pool(dsn) as pool:
        await pool.execute("CREATE TABLE orders (number bigint PRIMARY KEY, item text NOT NULL)")
        async with pool.acquire() as connection:
            await outbox.migrate(connection)

        await place_order(pool, OrderPlaced(1, "tea"), in_stock=True)
        print("committed:   order 1")
        try:
            await place_order(pool, OrderPlaced(2, "coffee"), in_stock=False)
        except LookupError as error:
            print(f"rolled back: order 2, {error}")

        await Relay(outbox, pool, HandlerDispatcher(handle)).run_once()  # a service would run() it for ever
        async with pool.acquire() as connection:
            print(f"left over:   {await outbox.counts(connection)}")


if __name__ == "__main__":
    asyncio.run(main())
