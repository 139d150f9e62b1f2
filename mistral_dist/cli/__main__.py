"""`python -m mistral_dist.cli`: the command `mistral-dist`."""

from mistral_dist.cli import main

main()
