"""The short form of `make chaos`: a few seconds of every fault there is, in every mode, and nothing is broken."""

from pathlib import Path

import pytest

from tests.chaos import MODES, run

_SECONDS = 7.0


@pytest.mark.timeout(110)
@pytest.mark.parametrize("mode", MODES)
async def test_a_short_storm_of_faults_breaks_no_promise(mode: str, tmp_path: Path) -> None:
    report = await run(mode, "a short storm", _SECONDS, tmp_path)
    assert not report.broken, f"{report}\nthe history and the log of the relays: {tmp_path}"
    assert len(report.history.deliveries) > 500
    assert report.verdict.explained, "faults that repeat nothing prove nothing"
