"""Public text and weights out of package indexes, for the SmolLM2 recipes."""
