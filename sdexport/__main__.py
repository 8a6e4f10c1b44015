"""`python -m sdexport`: the same as the command `sdexport`."""

from sdexport.cli import main

main()
