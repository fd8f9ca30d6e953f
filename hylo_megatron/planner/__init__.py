"""How much GPU memory a training takes, from shapes and the parallel layout alone. No torch in here."""
