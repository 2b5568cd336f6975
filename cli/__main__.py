"""`python -m cli` runs `deepseek` from the clone in the current folder."""

import sys

from cli.main import main

if __name__ == "__main__":
    sys.exit(main())
