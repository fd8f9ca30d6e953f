"""Weights between Hugging Face folders and Megatron checkpoints, by declarative tables and one tensor at a time."""
