"""Merge checkpoints into a new one."""
