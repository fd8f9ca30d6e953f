"""Recipes: declarations of whole runs, each with all its stages in one place."""
