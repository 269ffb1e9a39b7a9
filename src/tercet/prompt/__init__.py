"""Level 1: use a model as it is. LLM, model references, providers, templates, few-shot, chat."""
