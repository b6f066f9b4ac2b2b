"""Goes through the large worlds, some minutes; `python -m tests.protocol flaws` shows what each flaw leads to."""

import sys

from tests.protocol.worlds import FLAWED, LARGE


def main(what: str) -> int:
    if what == "flaws":
        for _, protocol in FLAWED:
            print(f"{', and '.join(flaw.value for flaw in protocol.flaws)}\n{protocol.check()}\n")
        return 0
    broken = 0
    for name, protocol in LARGE.items():
        report = protocol.check()
        broken += report.counterexample is not None
        print(f"{name}: {report}", flush=True)
    return broken


if __name__ == "__main__":
    sys.exit(main("".join(sys.argv[1:])))
