"""The service's old way to start, kept: ``python main.py`` serves; with arguments it is the command line."""

import sys

from lightweight_engine.__main__ import main

if __name__ == "__main__":  # the service's worker imports this file again
    main(sys.argv[1:] or ["serve"])
