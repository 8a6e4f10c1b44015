"""The command line of sdexport."""
