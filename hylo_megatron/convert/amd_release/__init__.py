"""Conversion of AMD's released HyLo checkpoints."""
