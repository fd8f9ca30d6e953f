"""AMD's released HyLo checkpoints, as ours."""
