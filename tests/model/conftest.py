"""Fixtures of the network's tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two rows of 30 token ids."""
    return torch.randint(0, 61, (2, 30), generator=torch.Generator().manual_seed(1))
