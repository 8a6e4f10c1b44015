"""A bundle on disk: its manifest, its files, and changes to them."""
