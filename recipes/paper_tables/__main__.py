"""`python -m lightning_conv.recipes.paper_tables` is `lightning-conv tables`."""

import sys

from lightning_conv.recipes.cli import main

if __name__ == "__main__":
    sys.exit(main(["tables", *sys.argv[1:]]))
