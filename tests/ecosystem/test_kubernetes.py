"""The manifest of the how-to: what it says fits the relay it runs, and the page's prose says the same."""

import inspect
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from outbox import Relay
from outbox._health import _PROBE_SECONDS  # noqa: TID251 -- its limits are compared with the page

PAGE = (Path(__file__).parents[2] / "docs/how-to/kubernetes.md").read_text(encoding="utf-8")
PROSE = " ".join(PAGE.split())


def default(setting: str) -> float:
    """Seconds that the relay takes when it is told nothing."""
    duration = inspect.signature(Relay).parameters[setting].default
    assert isinstance(duration, timedelta)
    return duration.total_seconds()


@pytest.fixture
def manifests() -> dict[str, Any]:
    [block] = re.findall(r"^```yaml[^\n]*\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(block)}


@pytest.fixture
def pod(manifests: dict[str, Any]) -> Any:
    return manifests["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture
def container(pod: Any) -> Any:
    [container] = pod["containers"]
    return container


def test_the_pod_is_given_longer_than_the_relay_takes_to_stop(pod: Any) -> None:
    assert pod["terminationGracePeriodSeconds"] >= default("grace") + 5


@pytest.mark.parametrize(("probe", "path"), [("livenessProbe", "/live"), ("readinessProbe", "/ready")])
def test_a_probe_waits_longer_than_its_answer_may_take(probe: str, path: str, container: Any) -> None:
    settings = container[probe]
    assert settings["httpGet"] == {"path": path, "port": "health"}
    assert _PROBE_SECONDS + 1 <= settings["timeoutSeconds"] <= settings["periodSeconds"]
    assert settings["failureThreshold"] > 1


def test_what_is_probed_is_what_the_relay_serves(container: Any) -> None:
    [port] = container["ports"]
    *command, option, address = container["command"]
    assert command[:2] == ["outbox", "relay"], "the program itself, which then gets the signal"
    assert (option, address) == ("--health", f"0.0.0.0:{port['containerPort']}")
    assert port["name"] == "health"


def test_one_replica_may_be_moved_at_a_time(manifests: dict[str, Any]) -> None:
    deployment, budget = manifests["Deployment"]["spec"], manifests["PodDisruptionBudget"]["spec"]
    assert 1 <= budget["minAvailable"] < deployment["replicas"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == budget["selector"]["matchLabels"] == labels


def test_the_prose_has_the_figures_of_the_code() -> None:
    for setting in ("grace", "lease"):
        assert f"`{setting}` ({default(setting):.0f} seconds by default)" in PROSE
    assert _PROBE_SECONDS == 2
    assert "which takes two seconds at most" in PROSE
    assert inspect.signature(Relay.health).parameters["max_age"].default == timedelta(minutes=1)
    assert "waiting for longer than a minute" in PROSE
