"""Backends: one folder for each engine library. `registry` lists them."""
