"""Public text and weights from package indexes, for the SmolLM2 recipes."""
