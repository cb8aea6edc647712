"""Published peaks of accelerators."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One accelerator as its maker states it.

    Attributes:
        flops: dense bfloat16 matrix products, FLOP/s.
        memory: bytes of its own memory.
        bandwidth: bytes/s of that memory.
        link: bytes/s that it sends to its neighbours: half of the stated bidirectional rate.
        island: how many chips such links join.
        network: bytes/s a chip sends beyond its island.
        source: where the figures stand.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    island: int
    network: float
    source: str


_TPU = "cloud.google.com/tpu/docs/"
_NVIDIA = "NVIDIA data sheet, SXM, without sparsity; network: one 400 Gb/s adapter a GPU, as in a DGX"

CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 256, 3.125e9, _TPU + "v5e"),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 8960, 6.25e9, _TPU + "v5p"),
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9, 256, 12.5e9, _TPU + "v6e"),
    "H100": Chip(989e12, 80e9, 3.35e12, 450e9, 8, 50e9, _NVIDIA),
    "H200": Chip(989e12, 141e9, 4.8e12, 450e9, 8, 50e9, _NVIDIA),
}
"""Name -> chip. A TPU's network is a chip's share of its pod's: 6.4 Tb/s of 256 v5e, 25.6 of 256 v6e; v5p 50 Gb/s."""

KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
}
"""What JAX calls a device -> its chip. Others of the same family (H100 PCIe, GH200) have other peaks."""


def published(kind: str) -> Chip | None:
    """The published peaks of a device; None where they do not stand here.

    Args:
        kind: `jax.Device.device_kind`.

    Returns:
        The chip.
    """
    return CHIPS.get(KINDS.get(kind, ""))
