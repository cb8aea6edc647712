"""The shape of a conversion table: one entry a tensor of the file, read in both directions."""

from collections.abc import Iterator
from typing import NamedTuple


class Entry(NamedTuple):
    """One tensor of a Hugging Face file and the parameters that it holds.

    Attributes:
        name: tensor name; `{i}` stands for the layer.
        paths: parameters that the tensor holds, "/"-joined; several where the file fuses them.
        pattern: einops pattern from the file's layout to ours. Fused parameters lie on its first output axis `n`.
        tower: stack whose layers `{i}` runs over; "" for a tensor that stands once.
        every: file layers per layer of that stack (a Q-Former's cross-attention stands at every second).
    """

    name: str
    paths: tuple[str, ...]
    pattern: str
    tower: str = ""
    every: int = 1

    def tensors(self, layers: dict[str, int]) -> Iterator[tuple[str, int]]:
        """The tensors' names with the row that each has on the parameters' leading axis (-1: none).

        Args:
            layers: layers of each tower.

        Yields:
            Name and row.
        """
        if not self.tower:
            yield self.name, -1
            return
        for row in range(-(-layers[self.tower] // self.every)):
            yield self.name.format(i=row * self.every), row


def norm(hf: str, path: str, tower: str = "", every: int = 1, *, rms: bool = False) -> list[Entry]:
    """Entries of a norm: scale, and bias unless it is an RMSNorm."""
    scale = Entry(f"{hf}.weight", (f"{path}/scale",), "d -> d", tower, every)
    return [scale] if rms else [scale, Entry(f"{hf}.bias", (f"{path}/bias",), "d -> d", tower, every)]


def dense(
    hf: str, path: str, bias: str | None, pattern: str, bias_pattern: str = "d -> d", tower: str = "", every: int = 1
) -> list[Entry]:
    """Entries of a linear map: its weight, and its bias where there is one.

    Args:
        hf: module name in the file.
        path: our kernel.
        bias: our bias; None without one.
        pattern: layout of the weight.
        bias_pattern: layout of the bias.
        tower: stack whose layers `{i}` runs over.
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
    """Entries of an attention layer with separate projections, heads outermost in the file.

    Args:
        hf: module names of q, k, v and o.
        path: our attention module.
        tower: stack whose layers `{i}` runs over.
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
