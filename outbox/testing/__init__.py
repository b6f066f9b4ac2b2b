"""Helpers for your tests: destinations that collect or fail, a relay that runs until nothing is left, a contract.

What a transaction has written needs no helper: `outbox.retrieve(connection, limit)` on its own connection returns
the messages before they are committed, and `assert_dispatched` takes what it returns.
"""

from outbox.testing._contract import CONTRACT, Broker, Case
from outbox.testing._fakes import (
    CollectingDispatcher,
    Expected,
    FailingDispatcher,
    Step,
    assert_dispatched,
    drain,
)

__all__ = [
    "CONTRACT",
    "Broker",
    "Case",
    "CollectingDispatcher",
    "Expected",
    "FailingDispatcher",
    "Step",
    "assert_dispatched",
    "drain",
]
