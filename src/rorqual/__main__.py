"""`python -m rorqual`: the command line."""

from rorqual.cli.entry import main

main()
