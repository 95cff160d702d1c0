"""Shared settings of the tests."""

import os
import shutil

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# The test problems are small: more threads cost more than they give, and results should not depend on the machine. Said before
# torch is imported, and for processes that tests start.
os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})

import pytest
import torch
from hypothesis import settings

# The same examples on every machine and in every run: a failure is then a change, not luck.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory):
    """An empty MLflow database: making one takes longer than most trainings of the tests, copying it does not."""
    mlflow = pytest.importorskip("mlflow")
    path = tmp_path_factory.mktemp("mlflow_database") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def one_mlflow_database(mlflow_database, tmp_path_factory):
    """Trainings of a module that say nothing of tracking share a database, a copy: the empty one stays empty for the others."""
    path = tmp_path_factory.mktemp("shared_tracking") / "mlflow.db"
    shutil.copyfile(mlflow_database, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        yield


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory, mlflow_database):
    """A real server, one for all tests: it takes about 20 s to come up."""
    from mlflow_server import MlflowServer

    server = MlflowServer(tmp_path_factory.mktemp("mlflow_server"), mlflow_database)
    yield server.start()
    server.kill()
