"""Handlers in the process of the relay: the articles of the contract that are not about a broker."""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext

import pytest

from outbox import Dispatcher, HandlerDispatcher, Message, RejectedError, RoutingDispatcher
from outbox.testing import CONTRACT, Broker, Case


class Handlers(Broker):
    too_large: int | None = 100_000
    unroutable: str | None = "nobody.handles.this"

    def __init__(self) -> None:
        self._arrived: list[Message] = []
        self._news = asyncio.Event()

    def destination(self) -> AbstractAsyncContextManager[Dispatcher]:
        return nullcontext(RoutingDispatcher({self.topic: HandlerDispatcher(self._handle)}))

    async def _handle(self, message: Message) -> None:
        if len(message.body) >= 100_000:
            raise RejectedError("too large")
        await asyncio.sleep(0)  # why: as any handler that waits for something, it lets others run
        self._arrived.append(message)
        self._news.set()

    async def received(self, count: int) -> Sequence[Message]:
        while len(self._arrived) < count:
            self._news.clear()
            await self._news.wait()
        return self._arrived


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.__name__)
async def test_the_contract(case: Case) -> None:
    await case(Handlers())
