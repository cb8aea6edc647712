"""Published specifications of accelerators."""

from typing import NamedTuple


class Chip(NamedTuple):
    """Published specifications of an accelerator.

    Attributes:
        flops: dense bfloat16 matrix products in FLOP/s.
        memory: memory in bytes.
        bandwidth: memory bandwidth in bytes/s.
        link: bytes/s sent to neighbours, half of the published bidirectional rate.
        island: number of chips that are connected by such links.
        network: bytes/s per chip to other islands.
        source: source of the figures.
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
"""Name -> chip. The network rate of a TPU is its share of the pod's: 6.4 Tb/s for 256 v5e, 25.6 for 256 v6e."""

KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
}
"""JAX's device kind -> chip. Variants such as H100 PCIe and GH200 have other specifications."""


def published(kind: str) -> Chip | None:
    """Returns the specifications of a device.

    Args:
        kind: `jax.Device.device_kind`.

    Returns:
        The chip, or None if unknown.
    """
    return CHIPS.get(KINDS.get(kind, ""))
