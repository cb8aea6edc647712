"""Conversion tables between checkpoint files and parameters, used in both directions."""

from collections.abc import Iterator
from typing import NamedTuple


class Entry(NamedTuple):
    """A tensor of a Hugging Face file (in every layer of a stack) and the parameters that it holds.

    Attributes:
        name: tensor name; `{i}` stands for the layer.
        paths: "/"-joined paths of the parameters that the tensor holds; several if the file fuses them.
        pattern: einops pattern from the file's layout to ours. Fused parameters are stacked on its first output axis
            `n`.
        tower: stack that `{i}` counts the layers of, a tower or an axis of `Depth.sizes`; "" for a single tensor.
        every: file layers per layer of the stack (2 for cross-attention in every second layer).
    """

    name: str
    paths: tuple[str, ...]
    pattern: str
    tower: str = ""
    every: int = 1

    def tensors(self, layers: dict[str, int]) -> Iterator[tuple[str, int]]:
        """Iterates over the names of the entry's tensors.

        Args:
            layers: tower name -> number of layers.

        Yields:
            Tensor name, and its index on the leading axis of the parameters (-1 without layers).
        """
        if not self.tower:
            yield self.name, -1
            return
        for row in range(-(-layers[self.tower] // self.every)):
            yield self.name.format(i=row * self.every), row


def norm(hf: str, path: str, tower: str = "", every: int = 1, *, rms: bool = False) -> list[Entry]:
    """Returns the entries of a norm: scale, and bias unless it is an RMSNorm."""
    scale = Entry(f"{hf}.weight", (f"{path}/scale",), "d -> d", tower, every)
    return [scale] if rms else [scale, Entry(f"{hf}.bias", (f"{path}/bias",), "d -> d", tower, every)]


def dense(
    hf: str, path: str, bias: str | None, pattern: str, bias_pattern: str = "d -> d", tower: str = "", every: int = 1
) -> list[Entry]:
    """Returns the entries of a linear map: weight, and bias if it has one.

    Args:
        hf: module name in the file.
        path: path of the kernel.
        bias: path of the bias, or None.
        pattern: layout of the weight.
        bias_pattern: layout of the bias.
        tower: see `Entry`.
        every: see `Entry`.

    Returns:
        One or two entries.
    """
    entries = [Entry(f"{hf}.weight", (path,), pattern, tower, every)]
    if bias is not None:
        entries.append(Entry(f"{hf}.bias", (bias,), bias_pattern, tower, every))
    return entries


def attention(
    hf: dict[str, str], path: str, tower: str, every: int = 1, *, qkv_bias: bool, out_bias: bool
) -> list[Entry]:
    """Returns the entries of an attention layer with separate projections.

    Args:
        hf: module names of q, k, v and o in the file, where heads are the outermost axis.
        path: path of the attention module.
        tower: see `Entry`.
        every: see `Entry`.
        qkv_bias: whether q, k and v have a bias.
        out_bias: whether o has one.

    Returns:
        Four to eight entries.
    """
    entries = []
    for name in "qkv":
        heads = "(k g d)" if name == "q" else "(k d)"
        ours = heads.strip("()")
        bias = f"{path}/{name}_bias" if qkv_bias else None
        entries += dense(hf[name], f"{path}/{name}", bias, f"{heads} e -> e {ours}", f"{heads} -> {ours}", tower, every)
    bias = f"{path}/o_bias" if out_bias else None
    return entries + dense(hf["o"], f"{path}/o", bias, "e (k g d) -> k g d e", "e -> e", tower, every)
