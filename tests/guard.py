"""Servers that end when the test run does, however it ends."""

import shutil


def guard(signal: str) -> tuple[str, ...]:
    """Returns what a command begins with to be sent this signal when its parent is gone, where the system has it."""
    return ("setpriv", "--pdeathsig", signal) if shutil.which("setpriv") else ()
