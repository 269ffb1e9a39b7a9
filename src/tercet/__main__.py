"""``python -m tercet``."""

from __future__ import annotations

import os
import sys

from tercet.cli.main import main

if __name__ == "__main__":
    status = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":  # one of several that torchrun started
        from tercet.train.ranks import exit_process

        exit_process(status)
    sys.exit(status)
