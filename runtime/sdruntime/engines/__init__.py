"""Engines of a bundle: build them, choose those that fit a machine, and hold those that a pipeline uses."""
