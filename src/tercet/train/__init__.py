"""Gradient steps: loop, schedule, losses, resume state, machine calibration."""
