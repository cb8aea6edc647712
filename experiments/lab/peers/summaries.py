"""Summary of the rounds: medians and ranges, ratios, cost of the cache, and speed of the machine."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.lab.bench.timing import format_spread
from experiments.lab.peers.runs import CONTENDERS
from experiments.lab.peers.task import EPOCHS
from experiments.report.as_markdown import table
from experiments.report.tables import Table

Record = Mapping[str, Any]
Rounds = Mapping[str, Sequence[Record]]
TRAINED = tuple(name for name in CONTENDERS if name != "ours_build")


def rate(record: Record) -> float:
    """Returns samples per second over all measured steps."""
    return record["rows"] * len(record["steps"]) / sum(step["seconds"] for step in record["steps"])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns median, minimum and maximum."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summary(rounds: Rounds, samples: int) -> dict[str, Any]:
    """Computes all figures.

    Args:
        rounds: contender -> its record of each round; all contenders have the same number of rounds.
        samples: rows of the data set.

    Returns:
        `contenders` (samples per second, bytes, seconds of set-up in the first round and in later rounds with compiled
        programs), `ratios`, `cache` and `machine`; medians with ranges. Ratios are computed within each round, so that
        other load affects both sides equally.
    """

    def each(name: str, value: Callable[[Record], float]) -> list[float]:
        return [value(record) for record in rounds[name]]

    def ratio(top: Sequence[float], bottom: Sequence[float]) -> dict[str, float]:
        return spread([a / b for a, b in zip(top, bottom, strict=True)])

    rates = {name: each(name, rate) for name in TRAINED}
    peaks = {name: each(name, lambda record: record["peak_bytes"]) for name in rounds}
    build = each("ours_build", lambda record: record["build_seconds"])
    # Time of three epochs: measured for the cached contender, extrapolated from one epoch for the others.
    whole = {name: [EPOCHS * samples / value for value in rates[name]] for name in TRAINED}
    whole["ours_cached"] = [a + b for a, b in zip(build, whole["ours_cached"], strict=True)]
    matmul = {"torch": each("trl", _matmul), "jax": each("ours_cached", _matmul)}
    faster = [jax / torch for jax, torch in zip(matmul["jax"], matmul["torch"], strict=True)]
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
    """Returns the number of epochs after which building the cache has paid off against another contender.

    Args:
        build: seconds to build the cache.
        samples: rows of the data set.
        other: samples per second of the other contender.
        cached: samples per second with the cache in each round.

    Returns:
        Epochs (not rounded); None if it never pays off.
    """
    saved = samples / other - samples / statistics.median(cached)
    return build / saved if saved > 0 else None


def _matmul(record: Record) -> float:
    return record["matmul_flops_per_second"]


def _contender(records: Sequence[Record], rates: Sequence[float] | None) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "versions": records[0]["versions"],
        "peak_bytes": spread([record["peak_bytes"] for record in records]),
        "baseline_bytes": spread([record["baseline_bytes"] for record in records]),
    }
    if rates is not None:
        setups = [record["setup_seconds"] for record in records]
        figures |= {
            "samples_per_second": spread(rates),
            "setup_seconds_first": setups[0],
            "setup_seconds_later": statistics.median(setups[1:] or setups),
            "losses": [step["loss"] for step in records[0]["steps"]],
        }
    return figures


AIMS = (
    ("cached / TRL grouped, samples per second", "cached_to_trl", ">=", 8.0),
    ("cached / tunix, samples per second", "cached_to_tunix", ">=", 8.0),
    (f"{EPOCHS} epochs with building the cache, TRL's time / ours", "cached_to_trl_whole", ">=", 3.0),
    (f"{EPOCHS} epochs with building the cache, tunix's time / ours", "cached_to_tunix_whole", ">=", 3.0),
    ("online / tunix, samples per second", "online_to_tunix", ">=", 1.5),
    ("peak memory, cached / tunix", "memory_cached_to_tunix", "<", 0.5),
)
MORE = (
    ("peak memory, cached with building the cache / tunix", "memory_with_building_to_tunix"),
    ("peak memory, online / tunix", "memory_online_to_tunix"),
    ("online / tunix with our batches (only the step)", "online_to_tunix_bucketed"),
    ("online / TRL grouped", "online_to_trl"),
    ("cached / TRL grouped, scaled to equal matmul rates", "cached_to_trl_at_even_matmul"),
)


def aims(ratios: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str, str, str]]:
    """Formats the ratios with aims (and whether the median meets them), then the ratios without aims.

    Args:
        ratios: from `summary`.

    Returns:
        Rows of a table.
    """

    def met(value: float, sense: str, aim: float) -> str:
        return "yes" if (value >= aim if sense == ">=" else value < aim) else "no"

    with_aims = [
        (what, format_spread(ratios[key], ".2f"), f"{sense} {aim:g}", met(ratios[key]["median"], sense, aim))
        for what, key, sense, aim in AIMS
    ]
    return with_aims + [(what, format_spread(ratios[key], ".2f"), "-", "-") for what, key in MORE]


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Builds the tables of contenders and of ratios.

    Args:
        figures: result of `summary`.

    Returns:
        Two tables.
    """
    rows = []
    for name, each in figures["contenders"].items():
        timed = "samples_per_second" in each
        rows.append(
            (
                CONTENDERS[name].label,
                format_spread(each["samples_per_second"], ".1f") if timed else "-",
                format_spread(each["peak_bytes"], ".0f", 1e-6),
                f"{each['baseline_bytes']['median'] / 1e6:.0f}",
                f"{each['setup_seconds_first']:.0f}, {each['setup_seconds_later']:.0f}" if timed else "-",
            )
        )
    head = ("contender", "samples per second", "peak MB", "imports MB", "set-up s: first, later rounds")
    return [Table(head, rows), Table(("ratio", "median (range)", "aim", "met"), aims(figures["ratios"]))]


def sentences(figures: Mapping[str, Any]) -> list[str]:
    """Describes the cost of the cache and the matmul rates of the machine.

    Args:
        figures: result of `summary`.

    Returns:
        Lines of text.
    """
    cache, machine = figures["cache"], figures["machine"]
    pay = ", ".join(
        f"{CONTENDERS[name].label}: {'never' if epochs is None else f'{epochs:.1f}'}"
        for name, epochs in cache["epochs_to_pay"].items()
    )
    return [
        f"Building the cache: {format_spread(cache['build_seconds'], '.1f')} s,"
        f" {cache['seconds_a_sample']['median'] * 1e3:.0f} ms and {cache['bytes_a_sample'] / 1e3:.0f} kB per sample."
        f" Epochs until it has paid off against {pay}.",
        f"float32 matmul on this core: torch {format_spread(machine['torch'], '.0f', 1e-9)} GFLOP/s, JAX"
        f" {format_spread(machine['jax'], '.0f', 1e-9)} GFLOP/s;"
        f" JAX / torch {format_spread(machine['jax_to_torch'], '.2f')}.",
    ]


def markdown(figures: Mapping[str, Any]) -> str:
    """Formats the figures as Markdown."""
    host = figures["machine_facts"]
    versions: dict[str, str] = {}
    for each in figures["contenders"].values():
        versions |= each["versions"]
    lines = [
        f"{host['cpu']}, one of {host['cores']} cores, load {host['load']} before and {host['load_after']} after;"
        f" {figures['repeats']} rounds; " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        *(table(content) for content in tables(figures)),
        *sentences(figures),
    ]
    return "\n\n".join(lines) + "\n"
