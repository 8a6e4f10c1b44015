"""A bundle measured beside what its user would otherwise run."""
