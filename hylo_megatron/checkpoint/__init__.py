"""Checkpoint folders: iterations, complete or absent writes, room on the disk, pickles without code."""
