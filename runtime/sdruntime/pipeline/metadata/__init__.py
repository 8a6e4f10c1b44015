"""The settings of an image in its file, in the form that other programs write and read."""
