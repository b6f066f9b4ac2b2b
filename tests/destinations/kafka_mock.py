"""The mock cluster of librdkafka: it speaks Kafka's protocol and keeps records in memory. It is not a Kafka broker."""

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

_PRODUCER: Final = 0
_UNKNOWN_TOPIC: Final = 3
_PRODUCE: Final = 0
_PARTITIONS: Final = 3
_TEXT: Final = 512


def _library() -> ctypes.CDLL:
    spec = find_spec("confluent_kafka")
    assert spec
    assert spec.origin
    (path,) = (Path(spec.origin).parent.parent / "confluent_kafka.libs").glob("librdkafka-*.so*")
    library = ctypes.CDLL(str(path))
    for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_mock_cluster_new"):
        getattr(library, name).restype = ctypes.c_void_p
    library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    return library


MESSAGE_TOO_LARGE: Final = 10
TOPIC_AUTHORIZATION_FAILED: Final = 29
INVALID_PRODUCER_EPOCH: Final = 47


class MockCluster:
    """A cluster of one mock broker, run by threads of this process.

    Args:
        topic: A topic, with three partitions.
        missing: A topic that it says is not there. Any other comes into being when it is asked for.
    """

    def __init__(self, topic: str, missing: str) -> None:
        self._library = _library()
        reason = ctypes.create_string_buffer(_TEXT)
        settings = self._call("rd_kafka_conf_new")
        self._call("rd_kafka_conf_set", settings, b"bootstrap.servers", b"127.0.0.1:1", reason, _TEXT)
        self._call("rd_kafka_conf_set", settings, b"log_level", b"0", reason, _TEXT)
        self._client = self._call("rd_kafka_new", _PRODUCER, settings, reason, _TEXT)
        assert self._client, reason.value
        self._cluster = self._call("rd_kafka_mock_cluster_new", self._client, 1)
        assert self._cluster
        self._call("rd_kafka_mock_topic_create", self._cluster, topic.encode(), _PARTITIONS, 1)
        self._call("rd_kafka_mock_topic_set_error", self._cluster, missing.encode(), _UNKNOWN_TOPIC)
        self.bootstrap_servers: str = self._library.rd_kafka_mock_cluster_bootstraps(
            ctypes.c_void_p(self._cluster)
        ).decode()

    def _call(self, name: str, *arguments: Any) -> Any:
        pointers = [ctypes.c_void_p(one) if isinstance(one, int) and one > 0xFFFF else one for one in arguments]
        return getattr(self._library, name)(*pointers)

    def down(self) -> None:
        """Cuts all connections, and refuses new ones; the records stay."""
        self._call("rd_kafka_mock_broker_set_down", self._cluster, 1)

    def up(self) -> None:
        """Lets it answer again."""
        self._call("rd_kafka_mock_broker_set_up", self._cluster, 1)

    def answer_after(self, milliseconds: int) -> None:
        """Delays each answer."""
        self._call("rd_kafka_mock_broker_set_rtt", self._cluster, 1, milliseconds)

    def refuse(self, error: int) -> None:
        """Answers the next request to produce with this error of the protocol."""
        code, one = ctypes.c_int(error), ctypes.c_size_t(1)
        self._call("rd_kafka_mock_push_request_errors", self._cluster, ctypes.c_int16(_PRODUCE), one, code)

    def lead(self, topic: str, broker: int | None) -> None:
        """Makes a broker the leader of all partitions of a topic, or leaves them without one."""
        for partition in range(_PARTITIONS):
            leader = ctypes.c_int32(-1 if broker is None else broker)
            self._call("rd_kafka_mock_partition_set_leader", self._cluster, topic.encode(), partition, leader)

    def close(self) -> None:
        """Ends it."""
        self._call("rd_kafka_mock_cluster_destroy", self._cluster)
        self._call("rd_kafka_destroy", self._client)
