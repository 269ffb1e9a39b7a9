"""Level 2: change some of a model for your task."""
