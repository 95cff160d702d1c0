"""A real browser without a window, moved through the WebDriver protocol; needs chromium and chromedriver."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-dev-shm-usage", "--force-device-scale-factor=1", "--window-size=1000,900",
)  # fmt: skip
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH")


class Browser:
    """One window of a browser."""

    def __init__(self, address):
        self.address = address
        # Addresses are those of this machine: a proxy of the environment must not be asked.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(self, method, path, body=None):
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with self.opener.open(request, timeout=60) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()[:500]}") from error

    def open(self, path, fragment=""):
        self.call("POST", "/url", {"url": "about:blank"})  # another fragment alone would not load the page anew
        self.call("POST", "/url", {"url": Path(path).as_uri() + fragment})

    def run(self, script, *args):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def wait(self, script, seconds=30.0):
        """Wait until ``script`` returns something true, and return it."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)
        return value

    def pixels(self, selector):
        """What is shown of an element, ``[h, w, 3]`` uint8."""
        element = self.call("POST", "/element", {"using": "css selector", "value": selector})
        data = self.call("GET", f"/element/{next(iter(element.values()))}/screenshot")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def click(self, selector):
        element = self.call("POST", "/element", {"using": "css selector", "value": selector})
        self.call("POST", f"/element/{next(iter(element.values()))}/click")

    def press(self, keys):
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": steps}]})

    def mouse(self, *steps, kind="mouse"):
        """Steps of one pointer, as WebDriver writes them."""
        action = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": list(steps)}
        self.call("POST", "/actions", {"actions": [action]})

    def wheel(self, x, y, down):
        step = {"type": "scroll", "x": round(x), "y": round(y), "deltaX": 0, "deltaY": down, "origin": "viewport"}
        self.call("POST", "/actions", {"actions": [{"type": "wheel", "id": "wheel", "actions": [step]}]})


@contextmanager
def browser():
    """Start a driver on a free port of this machine, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as profile:
        environment = os.environ | {"HOME": profile}
        process = subprocess.Popen(
            [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        try:
            window = Browser(f"http://127.0.0.1:{port}")
            for _ in range(200):
                try:
                    window.call("GET", "/status")
                    break
                except OSError:
                    time.sleep(0.05)
            chrome = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}/profile"]}
            wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": chrome}}}
            window.address += "/session/" + window.call("POST", "/session", wanted)["sessionId"]
            try:
                yield window
            finally:
                window.call("DELETE", "")
        finally:
            process.terminate()
            process.wait(timeout=20)
