"""Level 2: change some of a model's weights for your task."""
