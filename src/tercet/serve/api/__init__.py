"""OpenAI's and Anthropic's protocols, one file an endpoint."""
