"""One of two processes that build a cache: `python -m tests.distill.cache_process DIR MOMENT MESH ADDRESS PROCESS`."""

import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from antgmm_jax.parallel import processes, sharding
from experiments.run.host.meshes import devices


def main(directory: str, moment: str, mesh: str, address: str, process: str) -> None:
    """Builds the cache, or kills itself after the first batch is written."""
    with devices(mesh, address, 2, int(process)):
        from tests.distill import cached  # creates arrays, which must happen after the processes connect

        def batches():
            for batch in cached.batches():
                yield {name: x[sharding.local_rows(len(x))] for name, x in batch.items()}
                processes.barrier(str(batch["id"][0]))
                if moment == "half":
                    os.kill(os.getpid(), signal.SIGKILL)

        params = jax.tree.map(lambda x: sharding.place(np.asarray(x), ()), cached.PARAMS)
        cached.build(Path(directory), batches=batches, names=cached.STATES, params=params)


if __name__ == "__main__":
    main(*sys.argv[1:])
