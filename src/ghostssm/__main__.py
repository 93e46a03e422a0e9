"""The command's entry, for ``ghostssm`` and for ``python -m ghostssm``; all that takes time is imported in it."""

from ghostssm.files.interrupts import end_at_once


def main() -> None:
    """Run the command."""
    end_at_once()
    from ghostssm.cli import main as command

    command()


if __name__ == "__main__":
    main()
