"""The command line of sdruntime."""
