"""Shared settings of the tests."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import torch

# The test problems are small: more threads cost more than they give, and results should not depend on the machine.
torch.set_num_threads(1)
