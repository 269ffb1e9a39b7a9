"""Which type of blocks each matrix of a model is quantised to.

docs/experiments.md holds the measurements behind the choices.
"""

from __future__ import annotations
