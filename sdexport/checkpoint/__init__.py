"""Checkpoints as they are stored: configs, weights, tokenizers."""
