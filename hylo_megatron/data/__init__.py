"""Text and weights from pinned packages, and token files for training."""
