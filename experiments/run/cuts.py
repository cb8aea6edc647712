"""Pruning in a stage: target sizes of its segments, and new weights."""

from collections.abc import Collection, Mapping

import jax

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete, family
from antgmm_jax.io import checkpoint
from antgmm_jax.io.leaves import named_leaves
from antgmm_jax.io.placed import on_devices
from antgmm_jax.pure import Params, abstract, functional
from experiments.run.features import feature_bytes, freezes_features
from experiments.run.rows.samples import Samples
from experiments.run.schema import Stage


def new_weights(config: LMMConfig, source: str, seed: int) -> Params:
    """Returns new parameters of a pruned model, for baselines that do not keep the teacher's weights.

    Args:
        config: config of the pruned model.
        source: "random", or the folder of a finished phase of `antgmm train` that replaces random parameters.
        seed: random seed.

    Returns:
        float32 parameters.

    Raises:
        AntgmmError: the phase does not exist or has another shape.
    """
    params = functional(config).init(jax.random.key(seed))
    if source == "random":
        return on_devices(config, params, "float32")
    check_weights(config, source)
    return on_devices(config, {**params, **checkpoint.load_stage(source)[0]["params"]}, "float32")


def check_weights(config: LMMConfig, source: str) -> None:
    """Checks that a phase has trained parameters of a model, from its record alone.

    Args:
        config: config of the model.
        source: folder of a finished phase of `antgmm train`, with some of the model's parts.

    Raises:
        AntgmmError: the phase does not exist or has another shape.
    """
    needed = named_leaves({"params": abstract(config)})
    trained = {name: leaf.shape for name, leaf in checkpoint.stage_shapes(source).items()}
    parts = {name.split(".")[1] for name in trained}
    wanted = {name: leaf.shape for name, (path, leaf) in needed.items() if path[1] in parts}
    if other := sorted(name for name in {*trained, *wanted} if trained.get(name) != wanted.get(name)):
        shapes = [list(of.get(other[0], ())) or "absent" for of in (trained, wanted)]
        what = f"{other[0].removeprefix('params.')} is {shapes[0]}, not {shapes[1]}"
        raise AntgmmError(f"{source} was trained with another shape ({what}): use the same model.sizes in its recipe")


def reads_features(config: LMMConfig, stage: Stage, targets: Mapping[str, int]) -> bool:
    """Whether a stage can train on cached image features, because it neither changes nor prunes what computes them.

    Args:
        config: model config before the stage.
        stage: the stage.
        targets: axis -> target size.

    Returns:
        Whether the stage does not need to run the image side.
    """
    towers = {part.partition("/")[0] for part in family(config).features}
    cut = any(axis.partition("/")[0] in towers for axis in complete(config, targets))
    constant = stage.weights == "kept" and freezes_features(config, stage.frozen, stage.adapters)
    return constant and not (cut or stage.loss.vision)


def weighs_tokens(teacher: LMMConfig, stage: Stage) -> bool:
    """Whether the loss of a stage needs weights of the bridge's output tokens; a single token has the weight 1.

    Args:
        teacher: config of the teacher.
        stage: the stage.
    """
    return stage.loss.bridge_tokens == "sensitivity" and teacher.bridge_tokens > 1


def stored_features(config: LMMConfig, stage: Stage, samples: Samples) -> int:
    """Returns the bytes of image features that a stage keeps on disk, with `features = "disk"`.

    Args:
        config: model config before the stage.
        stage: the stage, which trains answers.
        samples: training records.
    """
    if not reads_features(config, stage, segment_targets(config, stage)[-1]):
        return 0
    return feature_bytes(config, samples, stage.shift, stage.optimizer.dtype)


def segment_targets(config: LMMConfig, stage: Stage) -> list[dict[str, int]]:
    """Returns the target sizes of each segment of a stage: equal parts, increased to the next legal sizes.

    Args:
        config: model config before the stage.
        stage: stage with sizes and segments.

    Returns:
        {axis: size} for each segment; the last one has the sizes of the stage.

    Raises:
        AntgmmError: an illegal size (names the nearest legal ones), or one above the current size.
    """
    present = sizes(config)
    final = pruning.resolve(config, stage.sizes)
    targets = []
    for segment in range(1, stage.segments):
        part = {
            axis: present[axis] + round((n - present[axis]) * segment / stage.segments) for axis, n in final.items()
        }
        targets.append(pruning.legal_above(config, part))
    return [*targets, final]


def projected_by(stage: Stage, config: LMMConfig) -> Collection[str]:
    """Returns the paths of parameters that a stage's cuts to principal components replace by new numbers.

    Args:
        stage: the stage.
        config: model config before the stage.
    """
    axes = complete(config, segment_targets(config, stage)[-1])
    widths = [axis for axis in axes if stage.method(axis) == "principal"]
    return pruning.projected(config, widths) if widths else ()


def planned(config: LMMConfig, stage: Stage, targets: Mapping[str, int]) -> LMMConfig:
    """Returns the config after pruning a stage to given sizes; components of the text width untie the head.

    Args:
        config: model config before.
        stage: the stage.
        targets: axis -> units, legal; from `segment_targets`.

    Returns:
        Config of the pruned model, as in `pruning.planned_config`.
    """
    if not targets:
        return config
    smaller, width = pruning.planned_config(config, targets), "text/embed"
    cut = sizes(smaller)[width] < sizes(config)[width]
    return pruning.untied(smaller) if cut and stage.method(width) == "principal" else smaller


def after(config: LMMConfig, stage: Stage) -> LMMConfig:
    """Returns the config after a stage.

    Args:
        config: model config before.
        stage: the stage.

    Raises:
        AntgmmError: as in `segment_targets`.
    """
    return planned(config, stage, segment_targets(config, stage)[-1])
