"""Training: the loop, schedules, losses, optimizers, checkpoints, and the calibration of the machine."""
