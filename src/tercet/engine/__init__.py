"""Tokens out: requests, sampling, KV cache, batched generation and scoring."""
