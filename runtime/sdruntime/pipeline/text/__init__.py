"""Prompts: tokens, and what the text encoders make of them."""
