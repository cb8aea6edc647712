"""SIGTERM is noticed at safe points; a second one ends the process at once, also while XLA computes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from antgmm_jax.parallel import preemption

ROOT = Path(__file__).resolve().parents[2]


def terminated(messages: list[str]) -> None:
    """Sends SIGTERM to this process, and waits until it is announced."""
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 10
    while not messages and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_loop_ends_at_the_next_safe_point_after_sigterm():
    before, done, messages = signal.getsignal(signal.SIGTERM), [], []

    def work():
        for item in preemption.leaving(range(5)):
            done.append(item)
            if item == 2:
                terminated(messages)

    with preemption.watched(messages.append), pytest.raises(preemption.Preempted):
        work()
    assert done == [0, 1, 2]
    assert messages == ["SIGTERM: saving at the next safe point; a second SIGTERM ends the run at once"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert not preemption.requested()
    preemption.leave()


def test_other_signals_are_not_taken_for_sigterm():
    messages = []
    handler = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with preemption.watched(messages.append):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
            assert not preemption.requested()
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert messages == []


def test_a_second_sigterm_ends_the_process_while_xla_computes():
    code = (
        "import jax, sys; from antgmm_jax.parallel import preemption\n"
        "loop = lambda x: jax.lax.while_loop(lambda x: x > 0, lambda x: jax.numpy.sin(x) + 2, x)\n"
        "forever = jax.jit(loop).lower(1.0).compile()\n"
        "def announce(message): print(message, flush=True)\n"
        "with preemption.watched(announce): print('computes', flush=True); jax.block_until_ready(forever(1.0))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "computes\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline().startswith("SIGTERM: saving")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 143
    finally:
        process.kill()
        process.stdout.close()
