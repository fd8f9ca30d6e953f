"""The orchestrator: starts the trainings of a recipe, one stage after another, and reports."""
