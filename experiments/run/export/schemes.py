"""Numbers of quantized exports."""

from enum import StrEnum


class Scheme(StrEnum):
    """Numbers of weights (W) and of activations (A), or FP8 for both."""

    W8A8 = "w8a8"
    W4A16 = "w4a16"
    FP8 = "fp8"
