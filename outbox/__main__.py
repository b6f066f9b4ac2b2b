"""The command line, where the program `outbox` is not on the path: `python -m outbox`."""

import sys

from outbox.cli import main

sys.exit(main())
