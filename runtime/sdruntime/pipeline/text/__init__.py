"""Prompts: tokens and text conditioning."""
