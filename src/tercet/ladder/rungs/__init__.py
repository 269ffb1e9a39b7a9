"""The rungs of the ladder: ways to answer a task, from the cheapest to the most expensive."""
