"""Programs that tests start with torchrun or as processes of their own; some also lend their functions to a test."""
