"""``python -m tercet``."""

from __future__ import annotations

import os
import sys

from tercet.cli.main import main

status = main()
if "WORLD_SIZE" in os.environ:  # torchrun's
    from tercet.train.ranks import leave

    leave(status)
sys.exit(status)
