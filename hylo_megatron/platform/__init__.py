"""What the machine has, and what makes megatron-core run on it."""
