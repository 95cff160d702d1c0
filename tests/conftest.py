"""Shared settings of the tests."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest
import torch
from hypothesis import settings

# The same examples on every machine and in every run: a failure is then a change, not luck.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# The test problems are small: more threads cost more than they give, and results should not depend on the machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory):
    """An empty MLflow database: making one takes longer than most trainings of the tests, copying it does not."""
    mlflow = pytest.importorskip("mlflow")
    path = tmp_path_factory.mktemp("mlflow_database") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory, mlflow_database):
    """A real server, one for all tests: it takes about 20 s to come up."""
    from mlflow_server import MlflowServer

    server = MlflowServer(tmp_path_factory.mktemp("mlflow_server"), mlflow_database)
    yield server.start()
    server.kill()
