"""Generation and scoring of tokens: requests, batches, sampling, constraints, and the key/value cache."""
