"""Models in the formats of other programs, each checked after it is written."""
