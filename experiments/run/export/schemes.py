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
    """Checks that transformers runs a model with a scheme.

    Args:
        config: model config.
        scheme: the scheme.

    Raises:
        AntgmmError: it does not.
    """
    if config.encoder_decoder and scheme is Scheme.W4A16:  # its MLP reads the dtype of a weight, which is packed
        raise AntgmmError("transformers does not run an encoder-decoder model with w4a16: choose w8a8 or fp8")
