"""Which components a model becomes, and the modules that are traced."""
