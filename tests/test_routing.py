"""`RoutingDispatcher`: a batch goes its ways, and what becomes of each part."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from outbox import (
    DestinationUnavailableError,
    Dispatcher,
    HandlerDispatcher,
    Message,
    NoWaiting,
    Outbox,
    PartialDispatchError,
    RejectedError,
    Relay,
    RoutingDispatcher,
)
from outbox.testing import CollectingDispatcher, FailingDispatcher, drain


def messages(*topics: str) -> list[Message]:
    return [Message(number, topic=topic) for number, topic in enumerate(topics)]


async def test_each_topic_goes_to_its_dispatcher_in_one_call_and_in_order() -> None:
    orders, stock = CollectingDispatcher(), CollectingDispatcher()
    batch = messages("orders", "stock", "orders", "stock", "orders")
    await RoutingDispatcher({"orders": orders, "stock": stock}).dispatch(*batch)
    assert orders.batches == [(batch[0], batch[2], batch[4])]
    assert stock.batches == [(batch[1], batch[3])]


async def test_the_first_pattern_that_fits_is_taken_and_topics_are_compared_as_they_are() -> None:
    placed, others, rest = CollectingDispatcher(), CollectingDispatcher(), CollectingDispatcher()
    routing = RoutingDispatcher({"orders.placed": placed, "orders.*": others, "*.audit": rest}, default=rest)
    batch = messages("orders.placed", "orders.paid.twice", "orders.audit", "stock.audit", "Orders.placed")
    await routing.dispatch(*batch)
    assert placed.messages == batch[:1]
    assert others.messages == batch[1:3]
    assert rest.messages == batch[3:]


async def test_topics_of_one_dispatcher_go_in_one_call_also_when_it_cannot_be_hashed() -> None:
    class Unhashable(CollectingDispatcher):
        __hash__ = None  # type: ignore[assignment]  # as in a class that defines __eq__

    both = Unhashable()
    batch = messages("a", "b", "a")
    await RoutingDispatcher({"a": both, "b": both}).dispatch(*batch)
    assert both.batches == [tuple(batch)]


async def test_a_topic_without_a_route_fails_alone_and_is_not_rejected() -> None:
    orders = CollectingDispatcher()
    known, unknown = messages("orders", "nowhere")
    with pytest.raises(PartialDispatchError) as caught:
        await RoutingDispatcher({"orders": orders}).dispatch(known, unknown)
    assert list(caught.value.failures) == [unknown.id]
    assert str(caught.value.failures[unknown.id]) == "no route takes the topic 'nowhere'"
    assert not isinstance(caught.value.failures[unknown.id], RejectedError)
    assert orders.messages == [known]


async def test_a_slow_part_does_not_hold_back_the_others() -> None:
    arrived, slow = CollectingDispatcher(), asyncio.Event()

    async def wait(_: Message) -> None:
        await slow.wait()

    routing = RoutingDispatcher({"slow": HandlerDispatcher(wait), "quick": arrived})
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        tasks.create_task(routing.dispatch(*messages("slow", "quick")))
        await arrived.wait_for(1)
        slow.set()


async def test_the_failures_of_all_parts_come_together() -> None:
    def second(batch: tuple[Message, ...]) -> PartialDispatchError:
        return PartialDispatchError({batch[1].id: ValueError("second")})

    down = DestinationUnavailableError("down")
    routing = RoutingDispatcher({"named": FailingDispatcher([second]), "whole": FailingDispatcher([down])})
    batch = messages("named", "whole", "named", "whole")
    with pytest.raises(PartialDispatchError) as caught:
        await routing.dispatch(*batch)
    assert {name: repr(error) for name, error in caught.value.failures.items()} == {
        batch[1].id: repr(down),
        batch[2].id: "ValueError('second')",
        batch[3].id: repr(down),
    }


async def test_a_part_that_was_cancelled_from_inside_has_failed() -> None:
    class Broken:
        async def dispatch(self, *_: Message) -> None:
            raise asyncio.CancelledError

    (message,) = messages("broken")
    with pytest.raises(PartialDispatchError) as caught:
        await RoutingDispatcher({"broken": Broken()}).dispatch(message)
    assert list(caught.value.failures) == [message.id]


async def test_a_cancelled_call_cancels_every_part() -> None:
    cancelled: list[str] = []
    begun = asyncio.Event()

    async def wait(message: Message) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(message.topic)

    routing = RoutingDispatcher({"a": HandlerDispatcher(wait), "b": HandlerDispatcher(wait)})
    call = asyncio.create_task(routing.dispatch(*messages("a", "b")))
    async with asyncio.timeout(10):
        await begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert sorted(cancelled) == ["a", "b"]


async def test_of_a_part_that_is_rejected_as_a_whole_only_the_guilty_one_dies(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    """The error stands for several messages, so the relay tries them one by one before it buries any."""

    def refuse(batch: tuple[Message, ...]) -> RejectedError | None:
        return RejectedError("one of these") if any(message.payload == "bad" for message in batch) else None

    good, other = CollectingDispatcher(), CollectingDispatcher()
    routing = RoutingDispatcher({"picky": picky(refuse, good), "other": other})
    batch = [Message(payload, topic="picky") for payload in ("one", "bad", "two")]
    async with pool.acquire() as connection:
        await outbox.persist(connection, *batch, *messages("other"))
    relay = Relay(outbox, pool, routing, backoff=NoWaiting(max_tries=3), poll_interval=timedelta(milliseconds=10))
    async with asyncio.timeout(20):
        while await relay.run_once() or len(good.messages) < 2:
            pass
        await drain(outbox, pool, routing)
    async with pool.acquire() as connection:
        dead = await outbox.dead_letters(connection)
    assert [letter.message.payload for letter in dead] == ["bad"]
    assert sorted(message.payload for message in good.messages) == ["one", "two"]
    assert len(other.messages) == 1


def picky(refuse: Any, inner: Dispatcher) -> Dispatcher:
    class Picky:
        async def dispatch(self, *batch: Message) -> None:
            if error := refuse(batch):
                raise error
            await inner.dispatch(*batch)

    return Picky()
