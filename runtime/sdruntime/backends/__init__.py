"""The engine libraries, each in a folder of its own; `registry` lists them."""
