"""A real `foredraft serve` process for tests: started on a free port, its log kept, ended for sure."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import httpx

COMMAND = [sys.executable, "-c", "from foredraft.cli import main; main()", "serve", "--port", "0"]
PATIENCE = 120.0  # seconds, on a machine that does other things too


class ServerProcess:
    """Use as a context; `url` is its address, `lines` what it has printed."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None, command: list[str] | None = None):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        environment.pop("FOREDRAFT_API_KEYS", None) if "FOREDRAFT_API_KEYS" not in (environment or {}) else None
        self.lines: list[str] = []
        self.headers: dict[str, str] = {}  # of our own questions, where a key is asked for
        self.process = subprocess.Popen(
            [*(command or COMMAND), *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._address()

    def __enter__(self) -> "ServerProcess":
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def wait_ready(self) -> None:
        until(lambda: httpx.get(f"{self.url}/ready").status_code == 200, self.dead)

    def dead(self) -> str | None:
        return None if self.process.poll() is None else "".join(self.lines)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in list(self.lines) if line.startswith("{")]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in httpx.get(f"{self.url}/metrics", headers=self.headers).text.splitlines():
            found = re.fullmatch(r"([a-zA-Z_:]+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name and all(f'{k}="{v}"' in (found[2] or "") for k, v in labels.items()):
                total += float(found[3])
        return total

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def idle(self) -> bool:
        """Whether every slot is free and nobody waits."""
        return self.metric("foredraft:num_requests_running") == self.metric("foredraft:num_requests_waiting") == 0

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def _address(self) -> str:
        pattern = re.compile(r"foredraft serves on (http://\S+)")
        until(lambda: any(pattern.search(line) for line in list(self.lines)), self.dead)
        return next(found[1] for line in self.lines if (found := pattern.search(line)))


def until(done: Any, dead: Any = lambda: None) -> None:
    """Wait for something that comes soon, or fail loudly."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if done():
                return
        except httpx.HTTPError:
            pass
        if dead():
            raise AssertionError(f"the server ended: {dead()}")
        time.sleep(0.02)
    raise AssertionError("it did not come")
