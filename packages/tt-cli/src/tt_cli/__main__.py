"""``python -m tt_cli`` is ``tt``."""

import os
import sys

if __name__ == "__main__":
    # Python puts the working folder first: a json.py that a foreign folder holds would run
    if not sys.flags.safe_path and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):  # noqa: PTH109, PTH120
        del sys.path[0]
    from tt_cli.main import main

    sys.exit(main())
