"""``python -m tercet``."""

from __future__ import annotations

import sys

from tercet.cli.main import main

sys.exit(main())
