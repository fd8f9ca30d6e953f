"""The orchestrator: start the training stages of a recipe one after another, and report."""
