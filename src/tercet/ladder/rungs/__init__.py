"""Ways to solve a task, cheapest first."""
