"""The short form of `make chaos`: seconds of every fault there is, in a mode of each order, and nothing is broken."""

from pathlib import Path

import pytest

from tests.chaos import MODES, run

_SECONDS = 3.0
# One of each order, and each way to commit; with "park" a key is blocked as well, before it is parked.
_SHORT = ["none-mark", "key-park-delete", "total-block-mark"]


def test_the_short_form_has_a_mode_of_each_order() -> None:
    assert [MODES[name].order for name in _SHORT] == ["none", "key", "total"]


@pytest.mark.timeout(110)
@pytest.mark.parametrize("mode", _SHORT)
async def test_a_short_storm_of_faults_breaks_no_promise(mode: str, tmp_path: Path) -> None:
    report = await run(mode, "a short storm", _SECONDS, tmp_path)
    assert not report.broken, f"{report}\nthe history and the log of the relays: {tmp_path}"
    assert len(report.history.deliveries) > 500
    assert len(report.injected) > 10, "faults that do not happen prove nothing"
