"""Distillation of the hybrid from its teacher: layer by layer (``ild``) and end to end (``distill``)."""
