"""Run the command `sdexport` as `python -m sdexport`."""

from sdexport.cli.main import main

main()
