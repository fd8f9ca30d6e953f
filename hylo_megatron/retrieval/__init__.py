"""Synthetic samples whose answer lies far back in the text."""
