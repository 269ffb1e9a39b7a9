"""Level 3: build a tokenizer and a trained network from raw text."""
