"""What several tests share; imported from the folder `tests`, which pytest puts on the path."""
