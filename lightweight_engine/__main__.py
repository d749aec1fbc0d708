"""``python -m lightweight_engine`` is the command line."""

from __future__ import annotations

from collections.abc import Sequence

from .apps.interrupts import end_by_interrupt


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and have Ctrl-C end it while it is still imported too. Always ends in SystemExit."""
    end_by_interrupt()
    from .apps import cli

    cli.main(arguments)


if __name__ == "__main__":
    main()
