"""A server in a process of its own, from its start to its end."""

import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from antgmm_jax.errors import AntgmmError

_START = 600.0
"""Seconds until a server must be ready."""
_STOP = 60.0
"""Seconds until it must have ended."""


@contextmanager
def serving(command: Callable[[int], Sequence[str]], log: Path) -> Iterator[str]:
    """Starts a server and ends it with SIGTERM.

    Args:
        command: port -> command of a server at that port of 127.0.0.1, with `/health` and `/v1`.
        log: file for its output.

    Yields:
        URL of its OpenAI interface, when it is ready.

    Raises:
        AntgmmError: it is not ready in time, or does not end.
    """
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen([*command(port)], stdout=output, stderr=output)
        try:
            _wait(process, f"{base}/health", log)
            yield f"{base}/v1"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AntgmmError(f"the server did not end in {_STOP:g} s: see {log}") from None


def free_port() -> int:
    """Returns a TCP port of 127.0.0.1 that no process listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    """Waits until a server is ready."""
    end, opener = time.monotonic() + _START, urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < end:
        if process.poll() is not None:
            raise AntgmmError(f"the server ended with code {process.returncode} before it was ready: see {log}")
        try:
            with opener.open(url, timeout=5) as reply:
                if reply.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise AntgmmError(f"the server was not ready in {_START:g} s: see {log}")
