"""A fake backend whose engines compute nothing, for tests and for measuring the runtime's own overhead."""
