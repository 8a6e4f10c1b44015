"""Samplers as tables of coefficients, and what runs them."""
