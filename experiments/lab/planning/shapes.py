"""Shapes of models and batches on a mesh of devices that need not exist."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from antgmm_jax.blocks.pictures import without_pixels
from antgmm_jax.config import LMMConfig
from antgmm_jax.parallel import sharding
from antgmm_jax.pure import Params, abstract, functional
from experiments.lab.planning import compilers
from experiments.run.rows.random_batches import usual_image


def mesh_for(mesh: Mapping[str, int], chip: str) -> Mesh:
    """Returns a mesh of devices of a chip, which need not exist; of CPUs if `chip` is ""."""
    return sharding.make_mesh(**mesh, devices=compilers.devices(chip, math.prod(mesh.values())) if chip else None)


def model_shapes(config: LMMConfig, dtype: str) -> Params:
    """Returns the shapes of parameters in a dtype, split over the mesh that is set."""
    return sharding.place_tree(abstract(config, jnp.dtype(dtype)), functional(config).axes)


def image_tokens(config: LMMConfig, slots: int | None) -> int:
    """Returns the text positions of some image slots; None for those of one image of the usual size."""
    return config.usual_tokens * (slots or config.slots) // config.slots


def row_sharding() -> NamedSharding:
    """Returns the sharding of the rows of a batch on the mesh that is set."""
    return NamedSharding(jax.sharding.get_mesh(), PartitionSpec(sharding.RULES["batch"]))


def batch_shapes(
    config: LMMConfig, rows: int, length: int, answer: int, *, slots: int | None = None, features: str = ""
) -> Iterator[tuple[str, Any]]:
    """Returns the shapes of a training batch, split over the devices of the mesh.

    Args:
        config: model config.
        rows: number of samples.
        length: prompt tokens per sample, including image tokens.
        answer: answer tokens per sample.
        slots: image slots per sample; None for those of one image of the usual size.
        features: dtype of image features in place of pixels; "" for pixels.

    Yields:
        Names and shapes.
    """
    apart, where = config.encoder_decoder, row_sharding()
    prompt = length if apart else length + answer
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("input_ids", "attention_mask"), (prompt,))
    shapes |= dict.fromkeys(("positions", "targets", *(["decoder_input_ids"] if apart else [])), (answer,))
    for name, shape in shapes.items():
        yield name, jax.ShapeDtypeStruct((rows, *shape), jnp.int32, sharding=where)
    images = {
        name: jax.ShapeDtypeStruct((rows, slots or config.slots, *leaf.shape[1:]), leaf.dtype, sharding=where)
        for name, leaf in usual_image(config).items()
    }
    if features:
        made = jax.eval_shape(functional(config).features, abstract(config), images)
        yield "vision_features", jax.ShapeDtypeStruct(made.shape, jnp.dtype(features), sharding=where)
    yield "images", without_pixels(images) if features else images
