"""Structural pruning by named axes: score units, plan what to keep, gate, shrink, merge, and compute costs."""

from pruning.components import check_basis, principal, projected
from pruning.costs import Cost, cost, forward_flops
from pruning.gates import gates_at, gates_of, ones
from pruning.importance import activation, block_influence, last, magnitude, random, taylor
from pruning.keep import Keep, as_kept, check, compose, identity, is_basis, merge, shrunk_config, untied
from pruning.planning import check_scores, plan
from pruning.shrinking import array_keep, shrink, shrink_hf, take
from pruning.sizing import by_stage, free_axes, search
from pruning.targets import legal_above, planned_config, planned_configs, resolve

__all__ = [
    "Cost",
    "Keep",
    "activation",
    "array_keep",
    "as_kept",
    "block_influence",
    "by_stage",
    "check",
    "check_basis",
    "check_scores",
    "compose",
    "cost",
    "forward_flops",
    "free_axes",
    "gates_at",
    "gates_of",
    "identity",
    "is_basis",
    "last",
    "legal_above",
    "magnitude",
    "merge",
    "ones",
    "plan",
    "planned_config",
    "planned_configs",
    "principal",
    "projected",
    "random",
    "resolve",
    "search",
    "shrink",
    "shrink_hf",
    "shrunk_config",
    "take",
    "taylor",
    "untied",
]
