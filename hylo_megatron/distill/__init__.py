"""Distillation of the hybrid from its teacher: model, losses, schedule and command line."""
