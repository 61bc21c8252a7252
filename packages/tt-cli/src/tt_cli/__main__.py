"""``python -m tt_cli`` is ``tt``."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the working folder, which may hold a torch.py
    from tt_cli.main import main

    sys.exit(main())
