"""Orders under traffic, a relay killed in the middle, and the proof that nothing was lost.

It is what `outbox demo` runs; the code is in outbox/cli/demo.py.
"""

import sys

from outbox.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo"]))
