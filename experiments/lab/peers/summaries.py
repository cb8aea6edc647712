"""What the rounds say: medians and ranges, ratios round by round, what the cache costs, and the machine's part."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.lab.bench.timing import told
from experiments.lab.peers.runs import CONTENDERS
from experiments.lab.peers.task import EPOCHS
from experiments.report.as_markdown import table
from experiments.report.tables import Table

Record = Mapping[str, Any]
Rounds = Mapping[str, Sequence[Record]]
TRAINED = tuple(name for name in CONTENDERS if name != "ours_build")


def rate(record: Record) -> float:
    """Samples per second over all timed steps."""
    return record["rows"] * len(record["steps"]) / sum(step["seconds"] for step in record["steps"])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summary(rounds: Rounds, samples: int) -> dict[str, Any]:
    """All figures.

    Args:
        rounds: contender -> its record of each round, all of equal number.
        samples: rows of the data set.

    Returns:
        `contenders` (samples per second, bytes, seconds of set-up in the first round, compiled, and later, from kept
        programs), `ratios`, `cache` and `machine`; medians with ranges. A ratio is taken within each round, so that
        what else the machine did falls on both of its sides.
    """

    def each(name: str, value: Callable[[Record], float]) -> list[float]:
        return [value(record) for record in rounds[name]]

    def ratio(top: Sequence[float], bottom: Sequence[float]) -> dict[str, float]:
        return spread([a / b for a, b in zip(top, bottom, strict=True)])

    rates = {name: each(name, rate) for name in TRAINED}
    peaks = {name: each(name, lambda record: record["peak_bytes"]) for name in rounds}
    build = each("ours_build", lambda record: record["build_seconds"])
    # Three epochs: the cached contender's as they were run, the others' one epoch three times.
    whole = {name: [EPOCHS * samples / value for value in rates[name]] for name in TRAINED}
    whole["ours_cached"] = [a + b for a, b in zip(build, whole["ours_cached"], strict=True)]
    matmul = {"torch": each("trl", _matmul), "jax": each("ours_cached", _matmul)}
    faster = [ours / theirs for ours, theirs in zip(matmul["jax"], matmul["torch"], strict=True)]
    even = [value * factor for value, factor in zip(rates["trl"], faster, strict=True)]
    both = [max(pair) for pair in zip(peaks["ours_build"], peaks["ours_cached"], strict=True)]
    ratios = {
        "cached_to_trl": ratio(rates["ours_cached"], rates["trl"]),
        "cached_to_tunix": ratio(rates["ours_cached"], rates["tunix"]),
        "cached_to_trl_whole": ratio(whole["trl"], whole["ours_cached"]),
        "cached_to_tunix_whole": ratio(whole["tunix"], whole["ours_cached"]),
        "online_to_tunix": ratio(rates["ours_online"], rates["tunix"]),
        "online_to_tunix_bucketed": ratio(rates["ours_online"], rates["tunix_bucketed"]),
        "online_to_trl": ratio(rates["ours_online"], rates["trl"]),
        "memory_cached_to_tunix": ratio(peaks["ours_cached"], peaks["tunix"]),
        "memory_with_building_to_tunix": ratio(both, peaks["tunix"]),
        "memory_online_to_tunix": ratio(peaks["ours_online"], peaks["tunix"]),
        "cached_to_trl_at_even_matmul": ratio(rates["ours_cached"], even),
    }
    return {
        "contenders": {name: _contender(records, rates.get(name)) for name, records in rounds.items()},
        "ratios": ratios,
        "cache": {
            "build_seconds": spread(build),
            "seconds_a_sample": spread([seconds / samples for seconds in build]),
            "bytes_a_sample": rounds["ours_build"][0]["cache_bytes"] / samples,
            "epochs_to_pay": {
                name: pays(statistics.median(build), samples, statistics.median(rates[name]), rates["ours_cached"])
                for name in ("ours_online", "tunix", "trl")
            },
        },
        "machine": {name: spread(values) for name, values in matmul.items()} | {"jax_to_torch": spread(faster)},
    }


def pays(build: float, samples: int, other: float, cached: Sequence[float]) -> float | None:
    """Epochs after which building the cache has taken no more than the other contender; None where it never does.

    Args:
        build: seconds to build it.
        samples: rows of the data set.
        other: the other's samples per second.
        cached: samples per second from the cache, of each round.

    Returns:
        Epochs, as a fraction.
    """
    saved = samples / other - samples / statistics.median(cached)
    return build / saved if saved > 0 else None


def _matmul(record: Record) -> float:
    return record["matmul_flops_per_second"]


def _contender(records: Sequence[Record], rates: Sequence[float] | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "versions": records[0]["versions"],
        "peak_bytes": spread([record["peak_bytes"] for record in records]),
        "baseline_bytes": spread([record["baseline_bytes"] for record in records]),
    }
    if rates is not None:
        setups = [record["setup_seconds"] for record in records]
        found |= {
            "samples_per_second": spread(rates),
            "setup_seconds_first": setups[0],
            "setup_seconds_later": statistics.median(setups[1:] or setups),
            "losses": [step["loss"] for step in records[0]["steps"]],
        }
    return found


AIMS = (
    ("cached / TRL grouped, samples per second", "cached_to_trl", ">=", 8.0),
    ("cached / tunix, samples per second", "cached_to_tunix", ">=", 8.0),
    (f"{EPOCHS} epochs and the cache built, TRL's time / ours", "cached_to_trl_whole", ">=", 3.0),
    (f"{EPOCHS} epochs and the cache built, tunix's time / ours", "cached_to_tunix_whole", ">=", 3.0),
    ("online / tunix, samples per second", "online_to_tunix", ">=", 1.5),
    ("peak memory, cached / tunix", "memory_cached_to_tunix", "<", 0.5),
)
MORE = (
    ("peak memory, cached with the cache's building / tunix", "memory_with_building_to_tunix"),
    ("peak memory, online / tunix", "memory_online_to_tunix"),
    ("online / tunix given our batches: the step alone", "online_to_tunix_bucketed"),
    ("online / TRL grouped", "online_to_trl"),
    ("cached / TRL grouped, were torch's matmul as fast as JAX's", "cached_to_trl_at_even_matmul"),
)


def aims(ratios: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str, str, str]]:
    """Each aim: what, the ratio with its range, the aim, and whether the median meets it; then ratios without an aim.

    Args:
        ratios: of `summary`.

    Returns:
        Rows of text.
    """

    def met(value: float, sense: str, aim: float) -> str:
        return "yes" if (value >= aim if sense == ">=" else value < aim) else "no"

    found = [
        (what, told(ratios[key], ".2f"), f"{sense} {aim:g}", met(ratios[key]["median"], sense, aim))
        for what, key, sense, aim in AIMS
    ]
    return found + [(what, told(ratios[key], ".2f"), "-", "-") for what, key in MORE]


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """The contenders, and the ratios beside what they are to be.

    Args:
        figures: what `summary` gave.

    Returns:
        Two tables.
    """
    rows = []
    for name, found in figures["contenders"].items():
        timed = "samples_per_second" in found
        rows.append(
            (
                CONTENDERS[name].label,
                told(found["samples_per_second"], ".1f") if timed else "-",
                told(found["peak_bytes"], ".0f", 1e-6),
                f"{found['baseline_bytes']['median'] / 1e6:.0f}",
                f"{found['setup_seconds_first']:.0f}, {found['setup_seconds_later']:.0f}" if timed else "-",
            )
        )
    head = ("contender", "samples per second", "peak MB", "of it imports", "set-up s: first, later rounds")
    return [Table(head, rows), Table(("ratio", "median (range)", "aim", "met"), aims(figures["ratios"]))]


def sentences(figures: Mapping[str, Any]) -> list[str]:
    """What the cache costs, and what the machine has to do with it.

    Args:
        figures: what `summary` gave.

    Returns:
        Lines of text.
    """
    cache, machine = figures["cache"], figures["machine"]
    pay = ", ".join(
        f"{CONTENDERS[name].label}: {'never' if epochs is None else f'{epochs:.1f}'}"
        for name, epochs in cache["epochs_to_pay"].items()
    )
    return [
        f"Building the cache: {told(cache['build_seconds'], '.1f')} s,"
        f" {cache['seconds_a_sample']['median'] * 1e3:.0f} ms and {cache['bytes_a_sample'] / 1e3:.0f} kB a sample."
        f" Epochs until it has paid for itself against {pay}.",
        f"float32 matmul on this core: torch {told(machine['torch'], '.0f', 1e-9)} GFLOP/s, JAX"
        f" {told(machine['jax'], '.0f', 1e-9)} GFLOP/s; JAX / torch {told(machine['jax_to_torch'], '.2f')}.",
    ]


def markdown(figures: Mapping[str, Any]) -> str:
    """The figures for people."""
    whose = figures["machine_facts"]
    versions: dict[str, str] = {}
    for found in figures["contenders"].values():
        versions |= found["versions"]
    lines = [
        f"{whose['cpu']}, one of {whose['cores']} cores, load {whose['load']} before and {whose['load_after']} after;"
        f" {figures['repeats']} rounds; " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        *(table(each) for each in tables(figures)),
        *sentences(figures),
    ]
    return "\n\n".join(lines) + "\n"
