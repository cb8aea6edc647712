"""Pruning of a checkpoint on disk, with its speed relative to the disk."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig, towers
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import open_hf, save_hf
from antgmm_jax.io.hub import local
from antgmm_jax.presets import preset
from antgmm_jax.pure import Params
from data.source import Source
from experiments.run.calibration import scores_on
from experiments.run.export.card import Origin, title_of, write_card
from experiments.run.export.completion import complete
from experiments.run.export.publishing import fresh
from experiments.run.host import resources
from experiments.run.host.console import bar, count, table
from experiments.run.host.facts import machine
from experiments.run.rows.prompts import noted_prompt
from pruning.costs import total_parameters

_MB = 10**6


def targets_of(config: LMMConfig, name: str) -> dict[str, int]:
    """Returns the sizes of a preset as target sizes.

    Args:
        config: model config.
        name: name of the preset.

    Returns:
        axis -> units.

    Raises:
        AntgmmError: the preset has another family, or other head widths or query heads of a key-value head, which
            cannot be pruned.
    """
    small = preset(name)
    if small.family != config.family:
        raise AntgmmError(f"{name} has family {small.family}, the checkpoint {config.family}: specify sizes instead")
    if towers(small).keys() != towers(config).keys():
        parts = " and ".join(", ".join(towers(one)) for one in (small, config))
        raise AntgmmError(f"{name} and the checkpoint have other towers ({parts}): specify sizes instead")
    for tower in towers(small).values():
        mine, other = towers(config)[tower.name].stack, tower.stack
        if mine.head_dim != other.head_dim:
            raise AntgmmError(
                f"heads of {tower.name} have width {mine.head_dim}, in {name} {other.head_dim}: head widths cannot be"
                " pruned; specify sizes instead"
            )
        if mine.q_per_kv != other.q_per_kv:
            raise AntgmmError(
                f"a key-value head of {tower.name} has {mine.q_per_kv} query heads, in {name} {other.q_per_kv}: they"
                " are pruned together; specify sizes instead"
            )
    return sizes(small)


class _Reading:
    """Counts bytes read, with a progress bar."""

    def __init__(self) -> None:
        self._count: Callable[[int], None] = lambda _: None

    def __call__(self, nbytes: int) -> None:
        self._count(nbytes)

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[dict[str, Any]]:
        """Measures a phase that reads `total` bytes."""
        figures: dict[str, Any] = {"tensors": 0, "read": 0}
        with bar(f"{title}, MB", total // _MB) as update:

            def tell(nbytes: int) -> None:
                figures["tensors"] += 1
                figures["read"] += nbytes
                update(figures["read"] // _MB, "")

            self._count = tell
            start, cpu_start = time.perf_counter(), time.process_time()
            yield figures
            figures["seconds"] = time.perf_counter() - start
            figures["processor_seconds"] = time.process_time() - cpu_start


def cut(
    source: Path,
    targets: Mapping[str, int | float],
    out: Path,
    *,
    records: Source | None,
    max_shard_size: str = "5GB",
    disk: bool = False,
) -> dict[str, Any]:
    """Prunes a checkpoint without training, with one tensor in memory at a time.

    Args:
        source: Hugging Face directory, or a name of the Hub.
        targets: axis -> units to keep, or (float) the fraction to keep.
        out: folder to create.
        records: records to score units on (`scores_on`), with the whole model in memory; None for norms of weights.
        max_shard_size: larger weights are split into shards.
        disk: whether to also measure the speed of the disk.

    Returns:
        Figures as JSON types: parameters of both models; tensors, bytes, seconds and CPU seconds of `score` and `cut`;
        `memory` in bytes, empty except on Linux; `disk`, empty unless measured.

    Raises:
        AntgmmError: as in `open_hf`, `plan`, `check_scores` and `save_hf`.
    """
    if out.exists():
        raise AntgmmError(f"{out} exists: choose another name or remove it")
    how = "magnitude" if records is None else f"its activations on {len(records)} rows"
    prompt, origin = noted_prompt(source), Origin(f"pruned by {how}, without training,", str(source))
    source = local(source)
    with fresh(out) as partial:
        with resources.PeakMemory() as memory:
            reading = _Reading()
            config, params = open_hf(source, on_read=reading)
            pruning.resolve(config, targets)  # checks the sizes before reading anything
            if disk:
                resources.forget(_weights(source))
            with reading.phase("score", _bytes(params, params)) as score:
                if records is None:
                    scores = pruning.magnitude(params, config)
                else:
                    scores = scores_on(records, source, config, params, prompt=prompt)
                keep = pruning.plan(scores, config, targets)
                pruning.check_scores(scores, {axis: keep[axis] for axis in targets})
            smaller, kept = pruning.shrink(config, params, keep)
            if disk:
                resources.forget(_weights(source))
            with reading.phase("cut", _bytes(params, kept)) as written:
                save_hf(smaller, kept, partial, like=source, max_shard_size=max_shard_size)
        complete(partial, smaller)
        write_card(partial, smaller, origin, prompt, title=title_of(out))
    written["written"] = sum(path.stat().st_size for path in _weights(out))
    figures = {
        "source": str(source),
        "out": str(out),
        "params": {"source": total_parameters(config), "out": total_parameters(smaller)},
        "score": score,
        "cut": written,
        "memory": memory.figures,
        "disk": {},
        "machine": machine(),
    }
    if disk:
        figures["disk"] = _disk(source, out, score, written)
    return figures


def _weights(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _bytes(params: Params, kept: Params) -> int:
    """Bytes of the layers of `params` that are read for `kept`."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(kept), strict=True)
    layers = ((leaf, cut.shape[0] if leaf.stacked else leaf.shape[0]) for leaf, cut in pairs)
    return sum(math.prod((rows, *leaf.shape[1:])) * leaf.dtype.itemsize for leaf, rows in layers)


def _disk(source: Path, out: Path, score: Mapping[str, Any], cut: Mapping[str, Any]) -> dict[str, Any]:
    """Rates of the disk in bytes/s, and the time of each phase relative to the disk's."""
    whole = sum(path.stat().st_size for path in _weights(source))
    read = whole / resources.seconds_to_read(_weights(source))
    write = cut["written"] / resources.seconds_to_write(_weights(out), out.parent)
    expected = {"score": score["read"] / read, "cut": cut["read"] / read + cut["written"] / write}
    ratio = {"score": score["seconds"] / expected["score"], "cut": cut["seconds"] / expected["cut"]}
    ratio["both"] = (score["seconds"] + cut["seconds"]) / sum(expected.values())
    return {"read_per_second": read, "written_per_second": write, "ratio": ratio}


def shown(figures: Mapping[str, Any]) -> list[Any]:
    """Formats the figures as texts and a table.

    Args:
        figures: result of `cut`.

    Returns:
        Texts and a table.
    """
    ratio, rows = figures["disk"].get("ratio", {}), []
    for phase in ("score", "cut"):
        result = figures[phase]
        seconds, moved = result["seconds"], result["read"] + result.get("written", 0)
        to_disk = f"{ratio[phase]:.2f}x" if ratio else "not measured"
        gigabytes = (f"{result['read'] / 1e9:.2f}", f"{result.get('written', 0) / 1e9:.2f}")
        times = (f"{seconds:.1f}", f"{result['processor_seconds']:.1f}")
        rates = (f"{result['tensors'] / seconds:.0f}", f"{moved / seconds / 1e9:.2f}")
        rows.append((phase, *gigabytes, *times, *rates, to_disk))
    head = ["", "GB read", "GB written", "seconds", "CPU s", "tensors/s", "GB/s", "/ disk alone"]
    before, after = figures["params"].values()
    parts = [f"parameters: {count(before)} -> {count(after)}, {before / after:.1f}x fewer", table(head, rows)]
    if ratio:
        read, write = figures["disk"]["read_per_second"], figures["disk"]["written_per_second"]
        parts.append(
            f"the disk itself: {read / 1e9:.2f} GB/s read, {write / 1e9:.2f} GB/s written;"
            f" together {ratio['both']:.2f}x its own time"
        )
    memory, system = figures["memory"], figures["machine"]["system"]
    if memory:
        parts.append(
            f"anonymous memory: at most {memory['beyond'] / 1e9:.2f} GB above the {memory['before'] / 1e9:.2f} GB of"
            f" Python with its libraries ({system})"
        )
    else:
        parts.append(f"anonymous memory: not available on {system}")
    return [*parts, f"written: {figures['out']}"]
