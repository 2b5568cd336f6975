"""`python -m deepseek_client`."""

import sys

from deepseek_client.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
