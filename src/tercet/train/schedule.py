"""The learning rate over a run: warm-up, plateau, cool-down to zero."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, a plateau, and a linear cool-down to zero (a trapezoid).

    It needs no total length until the cool-down begins, so a run that is short of time can still end
    properly; at equal length it matches cosine (Hägele et al. 2024, arXiv:2405.18392).
    """

    steps: int
    warmup: int
    cooldown: int

    @staticmethod
    def of(steps: int, warmup: float = 0.05, cooldown: float = 0.5) -> Schedule:
        """Return a schedule whose warm-up and cool-down are shares of ``steps``."""
        steps = max(1, steps)
        return Schedule(steps, min(steps, max(1, round(warmup * steps))), min(steps, round(cooldown * steps)))

    def rate(self, step: int) -> float:
        """Return the share of the peak rate at ``step`` (from 0); it would be zero at step ``steps``."""
        up = (step + 1) / self.warmup if step < self.warmup else 1.0
        down = (self.steps - step) / (self.cooldown + 1) if self.cooldown else 1.0
        return max(0.0, min(up, down, 1.0))

    def ending(self, step: int, remaining: int, planned: Schedule) -> Schedule:
        """Return the schedule that ends ``remaining`` steps after ``step``, but no later than ``planned``.

        In the cool-down, the rate continues from its current value. On the plateau, the cool-down is as long
        as ``planned`` has it, or as long as the remaining steps.
        """
        steps = min(planned.steps, step + max(1, remaining))
        rate = (self.steps - step) / (self.cooldown + 1)
        if rate >= 1:  # still on the plateau
            return replace(self, steps=steps, cooldown=min(planned.cooldown, steps - step))
        return replace(self, steps=steps, cooldown=max(0, round((steps - step) / rate) - 1))
