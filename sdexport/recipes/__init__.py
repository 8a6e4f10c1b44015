"""Recipes: files that say which bundle and which engines are built."""
