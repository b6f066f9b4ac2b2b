"""`outbox doctor`: what is wrong, and what to do about it."""

from dataclasses import asdict
from typing import Final

from rich.padding import Padding
from rich.text import Text

from outbox._doctor import Finding, Limits, examine
from outbox.cli._console import console, print_json, printable
from outbox.cli._database import Database
from outbox.cli._failures import FOUND
from outbox.cli._settings import Duration

_DATABASE: Final = Database()
_LIMITS: Final = Limits()


async def doctor(
    *,
    database: Database = _DATABASE,
    max_age: Duration = _LIMITS.max_age,
    max_transaction: Duration = _LIMITS.max_transaction,
    json: bool = False,
) -> int:
    """Look for what is wrong, and say what to do about it.

    It ends with status 1 when it finds a problem; warnings alone are 0. Run it with the role of the relays.

    Args:
        database: Where.
        max_age: How long a message that is due may wait.
        max_transaction: How long a transaction may be open.
        json: For programs.
    """
    async with database.connected() as connection:
        limits = Limits(max_age=max_age, max_transaction=max_transaction)
        findings = await examine(connection, database.outbox, limits)
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        _show(findings)
    return FOUND if any(finding.level == "problem" for finding in findings) else 0


def _show(findings: list[Finding]) -> None:
    out = console()
    if not findings:
        out.print(Text("nothing is wrong", style="green"))
    for finding in findings:
        style = "bold red" if finding.level == "problem" else "yellow"
        out.print(Text.assemble((f"{finding.level} ({finding.check}): ", style), printable(finding.what)))
        out.print(Padding(printable(finding.remedy), (0, 0, 0, 2), expand=False))
