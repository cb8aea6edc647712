"""Plots as SVG in a style of their own: equal figures give equal files everywhere."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.figure import Figure

from experiments.run.folder import write_bytes


@contextmanager
def styled(style: Mapping[Any, Any] = MappingProxyType({})) -> Iterator[None]:
    """matplotlib's defaults and what is given over them, not the person's own style; it ends with the `with`."""
    with rc_context():
        rcdefaults()
        rcParams.update({"svg.hashsalt": "antgmm", **style})
        yield


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as SVG, without the date."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    write_bytes(path, file.getvalue())
