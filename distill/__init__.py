"""Distillation: losses, teacher targets, the train step and the training loop."""

from distill.align import Part, parts
from distill.build import build_cache, cache_size
from distill.cache import TeacherCache, fingerprint, has_cache, open_cache
from distill.chunked import answer_sums
from distill.loop import Diverged, Progress, train
from distill.losses import LossConfig
from distill.optimizer import Optimizer, OptimizerConfig, make_optimizer
from distill.sensitivity import bridge_weights
from distill.state import State, init_state, map_moments, shard_state, state_dtypes
from distill.step import Step, StepConfig, make_loss, make_step
from distill.teacher import NO_TEACHER, Teacher, cached, online

__all__ = [
    "NO_TEACHER",
    "Diverged",
    "LossConfig",
    "Optimizer",
    "OptimizerConfig",
    "Part",
    "Progress",
    "State",
    "Step",
    "StepConfig",
    "Teacher",
    "TeacherCache",
    "answer_sums",
    "bridge_weights",
    "build_cache",
    "cache_size",
    "cached",
    "fingerprint",
    "has_cache",
    "init_state",
    "make_loss",
    "make_optimizer",
    "make_step",
    "map_moments",
    "online",
    "open_cache",
    "parts",
    "shard_state",
    "state_dtypes",
    "train",
]
