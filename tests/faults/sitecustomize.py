"""Imported by Python itself at its start, where this folder is on the path: see __init__.py. Only workers have faults."""

import os
import sys

WORKERS = {"mistral_dist.train", "mistral_dist.debug.worker"}

if "FAULTS" in os.environ and WORKERS & set(sys.orig_argv) and not any("accelerate" in word for word in sys.orig_argv):
    import tests.faults.inject  # noqa: F401
