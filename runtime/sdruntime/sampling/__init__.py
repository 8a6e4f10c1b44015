"""Samplers as tables of coefficients, and their executor."""
