"""Recipes: files that describe a bundle and its engines."""
