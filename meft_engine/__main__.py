"""``python -m meft_engine`` is the command ``meft-engine``."""

import sys

from meft_engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
