"""Programs that measure; each prints a table and writes JSON to ``results``."""

import os

# What people install is compiled. Where Python is told not to keep that, each process would compile our modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
