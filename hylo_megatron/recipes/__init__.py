"""Recipes: whole runs, their stages declared in one place each."""
