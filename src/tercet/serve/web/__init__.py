"""The chat page: conversations in a database, and the files that a browser reads."""
