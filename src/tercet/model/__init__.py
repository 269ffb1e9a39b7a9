"""The network: configuration, transformer, families, checkpoint directories, tokenizer."""
