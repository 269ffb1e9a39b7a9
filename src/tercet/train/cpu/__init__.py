"""Training on a CPU: the network's forward and backward passes written out, a part of the batch a thread."""
