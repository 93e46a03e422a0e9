"""The command ``ghostssm``: one file per verb, each a thin caller of the library."""

from ghostssm.cli.main import main

__all__ = ["main"]
