"""The ladder: prompting, tuning and building measured on one task."""
