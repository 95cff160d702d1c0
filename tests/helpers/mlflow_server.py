"""A real MLflow server on a free port of this machine, which can be killed and started again with the same runs."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request


class MlflowServer:
    """``mlflow server`` with its database and artifacts in ``folder``; made from an empty database that is ready."""

    def __init__(self, folder, database):
        self.folder = folder
        shutil.copyfile(database, folder / "mlflow.db")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # a second process, for evaluations that nobody asks for
        with open(self.folder / "server.log", "ab") as log:
            # A session of its own, so that its workers can be killed with it.
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env=environment, start_new_session=True
            )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        end = time.monotonic() + 180
        while True:
            try:
                with opener.open(f"{self.uri}/health", timeout=2):
                    return self
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
                assert time.monotonic() < end, "the server did not come up"
                time.sleep(0.2)

    def kill(self):
        """At once, as a power cut does it."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
