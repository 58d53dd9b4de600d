"""`python -m fusellm`."""

from fusellm.cli.main import main

main()
