"""Ollama's own API, beside the others on the same port."""
