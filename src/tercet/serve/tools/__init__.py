"""Tool calls: the formats of chat templates, and parsing of answers that contain calls."""
