"""Numbers of quantized exports."""

from enum import StrEnum
from pathlib import Path

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError


class Scheme(StrEnum):
    """Numbers of weights (W) and of activations (A), or FP8 for both."""

    W8A8 = "w8a8"
    W4A16 = "w4a16"
    FP8 = "fp8"

    @property
    def multiple(self) -> int:
        """Number of which the sizes of a student should be multiples for this scheme; 0 if any will do."""
        return GROUPS[-1] if self is Scheme.W4A16 else 0

    @property
    def cpu_dtype(self) -> str:
        """Dtype with which vLLM runs it on a CPU: its kernels for four bits have no float32."""
        return "bfloat16" if self is Scheme.W4A16 else "float32"

    def beside(self, export: Path) -> Path:
        """Returns the folder of the quantized copy of an export."""
        return export.with_name(f"{export.name}-{self.value}")


GROUPS = (128, 64, 32)
"""Numbers of weights with a scale of their own, for four bits: those that servers have kernels for."""


def check_scheme(config: LMMConfig, scheme: Scheme) -> None:
    """Checks that a server runs a model with a scheme.

    Args:
        config: model config.
        scheme: the scheme.

    Raises:
        AntgmmError: none does.
    """
    from antgmm_jax.families import family  # on use: commands read `Scheme` before JAX is imported

    if family(config).vllm(config) is None:
        raise AntgmmError(
            f"nothing serves this model with {scheme.value}: vLLM, which reads quantized files, does not have it; leave"
            " out --quantize"
        )
