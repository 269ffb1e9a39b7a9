"""The levels measured on one task: tasks, metrics, statistics, rungs, report."""
