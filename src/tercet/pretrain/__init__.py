"""Level 3: from raw text to a tokenizer and a trained network."""
