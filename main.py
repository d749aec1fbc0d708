"""The service's old way to start, kept: ``python main.py`` is the command line."""

from lightweight_engine.apps.cli import main

main()
