"""Shared settings of the tests."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import torch
from hypothesis import settings

# The same examples on every machine and in every run: a failure is then a change, not luck.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# The test problems are small: more threads cost more than they give, and results should not depend on the machine.
torch.set_num_threads(1)
