"""All bodies and all tables of types, by endpoint: what docs/reference/fields.md is written from."""

from __future__ import annotations

from tercet.serve.api.anthropic_input import BLOCKS
from tercet.serve.api.anthropic_requests import CountRequest, MessageRequest
from tercet.serve.api.chat_completions import ChatBody
from tercet.serve.api.completions import CompletionsBody
from tercet.serve.api.embeddings import EmbeddingsBody
from tercet.serve.api.field_table import Body, Kinds
from tercet.serve.api.response_input import ITEMS, PARTS
from tercet.serve.api.response_requests import InputRequest, ResponseRequest
from tercet.serve.api.tokens import DetokenizeBody, TokenizeBody
from tercet.serve.ollama.requests import (
    ChatRequest,
    EmbeddingsRequest,
    EmbedRequest,
    GenerateRequest,
    PullRequest,
    ShowRequest,
)

ENDPOINTS: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionsBody,
    "/v1/embeddings": EmbeddingsBody,
    "/v1/responses": ResponseRequest,
    "/v1/responses/input_tokens": InputRequest,
    "/v1/messages": MessageRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/api/chat": ChatRequest,
    "/api/generate": GenerateRequest,
    "/api/embed": EmbedRequest,
    "/api/embeddings": EmbeddingsRequest,
    "/api/show": ShowRequest,
    "/api/pull": PullRequest,
}
TYPES: dict[str, Kinds] = {
    "Items of `input` (responses)": ITEMS,
    "Parts of an item (responses)": PARTS,
    "Blocks of `content` (messages)": BLOCKS,
}
