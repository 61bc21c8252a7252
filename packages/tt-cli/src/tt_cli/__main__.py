"""``python -m tt_cli`` is ``tt``."""

import sys

from tt_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
