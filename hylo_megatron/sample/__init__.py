"""Text that the teacher writes itself, as training text."""
