"""The one broker whose start takes seconds is shared; each test has a queue of its own there."""

from collections.abc import Iterator, Sequence

import pytest

from tests.destinations.rabbitmq_server import RabbitMQServer


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQServer]:
    with RabbitMQServer(tmp_path_factory.mktemp("rabbitmq")).running() as server:
        yield server


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Gives each as long as the contract does: a broker may take a minute to start, when the processors are busy."""
    for item in items:
        item.add_marker(pytest.mark.timeout(110))
