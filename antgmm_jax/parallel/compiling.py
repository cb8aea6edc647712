"""Options of XLA for the train step, by the platform of the devices."""

import jax

from antgmm_jax.parallel.sharding import devices, platform

_PIPELINED = ("all_gather", "reduce_scatter", "all_reduce")
# From this version on, XLA names the mode of each pipeline (https://github.com/openxla/xla/pull/45836).
_BY_MODE = jax.__version_info__ >= (0, 11, 1)

PROFILES: dict[str, dict[str, bool | int | str]] = {
    # Gathers of the next layer's weights start while a layer computes, also across iterations of a scan.
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        **(
            {f"xla_gpu_pipeline_{kind}": "COLLECTIVE_PIPELINING_MODE_ON" for kind in _PIPELINED}
            if _BY_MODE
            else {f"xla_gpu_enable_pipelined_{kind}": True for kind in _PIPELINED}
        ),
        "xla_gpu_enable_while_loop_double_buffering": True,
    },
    # Collectives run beside products. The compiler's estimate does not count collectives, so no gain is measured.
    "tpu": {
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_overlap_compute_collective_tc": True,
    },
}
"""Platform -> XLA option -> value; none for a CPU."""


def options() -> dict[str, bool | int | str] | None:
    """Returns the options of XLA for programs traced now; None for XLA's own, also on a GPU alone.

    Without collectives to hide, double buffering only makes larger programs of loops.
    """
    return PROFILES.get(platform()) if platform() != "gpu" or devices() > 1 else None
