"""What a task is, and how well a model does it: tasks, splits, metrics, statistics."""
