"""Lower bounds of the time of TPU kernels, for which the compiler has no estimate."""

import math
import re
from typing import NamedTuple

from experiments.lab.planning.chips import Chip
from experiments.lab.planning.hlo import Shape, shapes

_KERNEL = re.compile(r'%?([\w.-]+) = (.*?) custom-call\(.*custom_call_target="tpu_custom_call"')
_OPERANDS = re.compile(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}")
_BACKWARD = "splash_mha_dkv"
_PRODUCTS = {"splash_mha_fwd": 2, _BACKWARD: 4, "splash_mha_dq": 3}
"""Start of the name of a kernel -> its products of queries x keys x width. Both kernels of the backward pass compute
the logits again and the gradient of the weights; then one computes the gradients of values and keys, the other that of
queries. In short rows the first one computes all three, and has one more result."""


class Kernel(NamedTuple):
    """A kernel of a program.

    Attributes:
        name: its name.
        products: products of queries x keys x width; 0 for a kernel that is not known here.
        operands: types of its operands.
        results: types of its results.
    """

    name: str
    products: int
    operands: list[Shape]
    results: list[Shape]

    def seconds(self, chip: Chip) -> float:
        """Returns the larger of the times for products and for memory, each at its published rate."""
        moved = sum(each.size for each in (*self.operands, *self.results))
        return max(self._flops(chip.unit) / chip.flops, moved / chip.bandwidth)

    def _flops(self, unit: int) -> int:
        """FLOPs of its products, of all blocks of a causal mask, with the width padded to the matrix unit."""
        if not self.products:
            return 0
        queries, keys, *_ = (each.dims for each in self.operands if each.dtype == "bf16")
        return 2 * self.products * math.prod(queries[:-1]) * keys[-2] * -(-queries[-1] // unit) * unit


def kernel(line: str) -> Kernel | None:
    """Returns the kernel that an instruction runs; None if it runs none."""
    match, operands = _KERNEL.search(line), _OPERANDS.search(line)
    if match is None or operands is None:
        return None
    products, results = next((n for start, n in _PRODUCTS.items() if match[1].startswith(start)), 0), shapes(match[2])
    if match[1].startswith(_BACKWARD):
        products += sum(each.dtype == "bf16" for each in results) == 3
    return Kernel(match[1].rpartition(".")[0] or match[1], products, shapes(operands[1]), results)
