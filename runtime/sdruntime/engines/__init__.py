"""Engines of a bundle: which are built, which fit a machine, and those that a pipeline holds."""
