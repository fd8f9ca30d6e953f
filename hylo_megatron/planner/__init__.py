"""GPU memory of a training, from shapes and the parallel layout alone. No torch in here."""
