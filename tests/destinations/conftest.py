"""The one broker whose start takes seconds is shared; each test has a queue of its own there."""

from collections.abc import Iterator

import pytest

from tests.destinations.rabbitmq_server import RabbitMQServer


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQServer]:
    with RabbitMQServer(tmp_path_factory.mktemp("rabbitmq")).running() as server:
        yield server
