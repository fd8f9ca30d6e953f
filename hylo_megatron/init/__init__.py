"""Initialisation of the hybrid from its base model: what each new mixer's weights start from."""
