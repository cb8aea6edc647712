"""Load on a server: requests per second, latency, errors, and answers that change."""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from antgmm_jax.errors import AntgmmError
from data.record import Record
from experiments.run.scores.server import Server, answer, request_messages

DOWN = 100
"""Failed requests in a row, of all clients together, after which a server counts as down and its load ends."""
HEAD = ("clients", "model", "requests/s", "p50 ms", "p95 ms", "errors", "other answers", "ratio")


def under_load(
    server: Server,
    records: Sequence[Record],
    template: str,
    alone: Sequence[str],
    *,
    max_new_tokens: int,
    clients: int,
    duration: float,
) -> dict[str, Any]:
    """Measures a server with several clients that each send one question after another; ends at a server that is down.

    Args:
        server: the server.
        records: questions.
        template: prompt template.
        alone: the server's answers without load.
        max_new_tokens: maximum length of answers.
        clients: number of clients.
        duration: seconds.

    Returns:
        `requests_per_second`, `p50_ms`, `p95_ms`, `requests`, `errors`, `first_error`, and `other_answers`, the number
        of answers that differ from `alone`.
    """
    seconds: list[float] = []
    errors: list[str] = []
    other: list[int] = []
    failed = 0  # in a row
    # Pictures are read and encoded before: the clients would use the time and the cores of the server for it.
    requests = [request_messages(records[row], template) for row in range(len(alone))]
    begin = time.monotonic()

    def client(number: int) -> None:
        nonlocal failed
        row = number * len(alone) // clients
        while time.monotonic() < begin + duration and failed < DOWN:
            sent = time.perf_counter()
            try:
                text = answer(server, requests[row], max_new_tokens).text
            except AntgmmError as error:
                errors.append(str(error))
                failed += 1
            else:
                failed = 0
                seconds.append(time.perf_counter() - sent)
                other.extend([row] * (text != alone[row]))
            row = (row + 1) % len(alone)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.monotonic() - begin
    middle, high = (float(1e3 * np.percentile(seconds, q)) if seconds else float("nan") for q in (50, 95))
    return {
        "requests_per_second": len(seconds) / elapsed,
        "p50_ms": middle,
        "p95_ms": high,
        "requests": len(seconds),
        "errors": len(errors),
        "first_error": errors[0] if errors else "",
        "other_answers": len(other),
    }


def rows(figures: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Returns the lines of the table with `HEAD`; the ratio is that of requests per second to the first model's."""
    first = next(iter(figures.values()))["load"]
    lines = []
    for clients in first:
        for name, model in figures.items():
            one = model["load"][clients]
            base = first[clients]["requests_per_second"]
            ratio = f"{one['requests_per_second'] / base:.2f}x" if base else "-"
            # Three digits, but never as 1.84e+03.
            times = (f"{float(f'{one[key]:.3g}'):g}" for key in ("requests_per_second", "p50_ms", "p95_ms"))
            lines.append((clients, name, *times, str(one["errors"]), str(one["other_answers"]), ratio))
    return lines


def equal(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a line for each model: how many of its answers are those in JAX."""
    return [f"{name}: {m['equal_to_jax']} of {m['questions']} answers are JAX's" for name, m in figures.items()]


def faults(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a line for each load with errors: how many, and the first."""
    loads = [(name, clients, one) for name, model in figures.items() for clients, one in model["load"].items()]
    return [
        f"{name}, {clients} clients: {one['errors']} errors, the first: {one['first_error']}"
        for name, clients, one in loads
        if one["errors"]
    ]
