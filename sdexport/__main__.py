"""`python -m sdexport`: the same as the command `sdexport`."""

from sdexport.cli.main import main

main()
