"""Options of XLA for the train step, by the platform of the devices."""

from antgmm_jax.parallel.sharding import platform

PROFILES: dict[str, dict[str, bool | int | str]] = {
    # Gathers of the next layer's weights start while a layer computes, also across iterations of a scan.
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
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
    """Returns the options of XLA for programs traced now; None for XLA's own."""
    return PROFILES.get(platform())
