"""Tool calls: how chat templates write them, and how an answer is read for them."""
