"""Adapters (LoRA and its relatives): read their files, find the weights that they change, and compute the changes."""
