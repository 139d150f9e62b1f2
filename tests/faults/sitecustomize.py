"""Imported by Python itself at its start, where this folder is on the path: see __init__.py. Only workers have faults."""

import os

if "FAULTS" in os.environ and "RANK" in os.environ:
    import tests.faults.inject  # noqa: F401
