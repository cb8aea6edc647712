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
        kind: JAX's device kind.
        slices: dimensions of a TPU's network; 0 for a GPU.
        slice_type: name of the smallest slice of one machine for libtpu; "" for a GPU.
        clock: cycles/s of a TPU, at which its matrix units have the rate `flops`; 0 for a GPU.
        unit: rows and columns of a TPU's matrix unit; narrower operands are padded to it.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    island: int
    network: float
    source: str
    kind: str = ""
    slices: int = 0
    slice_type: str = ""
    clock: float = 0.0
    unit: int = 1

    def rate(self, devices: int) -> float:
        """Returns the bytes/s that a device of a group sends: over links inside an island, else over the network."""
        return self.link if devices <= self.island else self.network


_TPU = "cloud.google.com/tpu/docs/"
_NVIDIA = "NVIDIA data sheet, SXM, without sparsity; network: one 400 Gb/s adapter a GPU, as in a DGX"

CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 256, 3.125e9, _TPU + "v5e", "TPU v5 lite", 2, "v5litepod-4", 1.5e9, 128),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 8960, 6.25e9, _TPU + "v5p", "TPU v5", 3, "v5p-8", 1.75e9, 128),
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9, 256, 12.5e9, _TPU + "v6e", "TPU v6 lite", 2, "v6e-4", 1.75e9, 256),
    "H100": Chip(989e12, 80e9, 3.35e12, 450e9, 8, 50e9, _NVIDIA, "NVIDIA H100 80GB HBM3"),
    "H200": Chip(989e12, 141e9, 4.8e12, 450e9, 8, 50e9, _NVIDIA, "NVIDIA H200"),
}
"""Name -> chip. The network rate of a TPU is its share of the pod's: 6.4 Tb/s for 256 v5e, 25.6 for 256 v6e. Its clock
follows from its peak: 128 x 128 units, 4 of them in a v5e and 8 in a v5p; 4 of 256 x 256 in a v6e."""


def published(kind: str) -> Chip | None:
    """Returns the specifications of a device.

    Args:
        kind: `jax.Device.device_kind`.

    Returns:
        The chip, or None if unknown.
    """
    # Variants such as H100 PCIe and GH200 have other specifications.
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)
