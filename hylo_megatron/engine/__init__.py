"""Every change that is made to megatron-core, torch and other libraries at run time."""
