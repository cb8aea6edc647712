"""Reproducible SVG plots: equal figures give equal files on every machine."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.figure import Figure

from experiments.run.files import write_bytes


@contextmanager
def styled(style: Mapping[Any, Any] = MappingProxyType({})) -> Iterator[None]:
    """A context with matplotlib's defaults and `style`, independent of the user's settings."""
    with rc_context():
        rcdefaults()
        rcParams.update({"svg.hashsalt": "antgmm", **style})
        yield


def save(figure: Figure, path: Path) -> None:
    """Saves a figure as SVG, without a date."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    write_bytes(path, file.getvalue())
