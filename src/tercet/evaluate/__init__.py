"""Tasks, and measuring how well a model does them: splits, answers, metrics, statistics."""
