"""Training on a CPU: written-out forward and backward passes, with a part of the batch for each thread."""
