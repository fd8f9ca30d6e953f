"""Settings of sampling for small models."""

from hylo_megatron.sample.decoder import Sampling

LENGTH = 24


def sampling(**changes) -> Sampling:
    values = dict(temperature=0.9, top_p=0.9, length=LENGTH, seed=5, ends=frozenset({2, 7}))
    return Sampling(**(values | changes))
