"""Profiles of train steps by `jax.profiler`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from antgmm_jax.errors import AntgmmError
from experiments.run.host.console import say

Step = Callable[..., Any]


def parse_steps(text: str) -> range:
    """Parses the option --profile.

    Args:
        text: `FIRST:LAST`, or one step; "" for none.

    Returns:
        The steps.

    Raises:
        AntgmmError: the text is invalid.
    """
    if not text:
        return range(0)
    first, colon, last = text.partition(":")
    if not first.isdecimal() or not (last.isdecimal() or not colon) or int(last or first) < int(first):
        raise AntgmmError(f"--profile {text}: write it as FIRST:LAST, as in 10:14")
    return range(int(first), int(last or first) + 1)


class Trace:
    """Traces steps of the first stage that takes the first of them; every process writes its own files.

    Args:
        steps: numbers of the steps, from 0; empty for none.
        folder: folder of the files, for TensorBoard or xprof, and as `perfetto_trace.json.gz` for ui.perfetto.dev.
    """

    def __init__(self, steps: range, folder: Path):
        self._steps, self._folder = steps, folder / f"process-{jax.process_index()}"
        self._running = False

    def around(self, step: Step, number: int) -> Step:
        """Returns a train step that starts and ends the trace.

        Args:
            step: the train step; it returns arrays.
            number: number of its first call.
        """
        if not self._running and (not self._steps or number > self._steps.start):
            return step

        def traced(*arguments: Any) -> Any:
            nonlocal number
            if self._steps and number == self._steps.start and not self._running:
                jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
                self._running = True
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                result = step(*arguments)
            if self._running and number >= self._steps[-1]:
                jax.block_until_ready(result)
                self.close()
            number += 1
            return result

        return traced

    def close(self) -> None:
        """Writes the trace if it is running, also when training has ended before its last step."""
        if self._running:
            jax.profiler.stop_trace()
            say(f"profile of steps from {self._steps.start}: {self._folder}")
            self._running, self._steps = False, range(0)
