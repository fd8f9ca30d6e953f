"""Which layers stay attention: scores of layers, and the plan that a budget allows."""
