"""Tests side by side (`pytest -n`): one thread for each worker, set before torch starts its own."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
