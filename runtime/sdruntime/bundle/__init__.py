"""Bundles on disk: the manifest, the files, and changes to them."""
