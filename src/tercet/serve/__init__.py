"""Talk to a model over HTTP: OpenAI's protocol for programs, a chat page for people."""
