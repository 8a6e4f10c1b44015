"""Concurrent requests: a queue, and a service for non-Python hosts."""
