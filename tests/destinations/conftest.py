"""The one broker whose start takes seconds is shared; each test has a queue of its own there."""

from collections.abc import Iterator, Sequence

import pytest

from tests.destinations.rabbitmq_server import RabbitMQServer


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQServer]:
    with RabbitMQServer(tmp_path_factory.mktemp("rabbitmq")).running() as server:
        yield server


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Gives ten thousand messages as long as the contract does: over HTTP each is a request, and a line on disk."""
    for item in items:
        if "ten_thousand" in item.name:
            item.add_marker(pytest.mark.timeout(110))
