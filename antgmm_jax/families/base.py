"""What a family provides; nothing outside its folder knows more of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from antgmm_jax.config import LMMConfig
from antgmm_jax.families.rules import Tie
from antgmm_jax.families.table import Entry

if TYPE_CHECKING:
    from transformers import ProcessorMixin

Keep = Mapping[str, np.ndarray]


class Inputs(Protocol):
    """The host side of a family: a record as token ids and a tree of pictures.

    Attributes:
        processor: of the checkpoint; the tokenizer is its `tokenizer`.
        encoder_decoder: whether prompt and answer are read apart.
    """

    processor: "ProcessorMixin"
    encoder_decoder: bool

    def prompt(self, line: str, pictures: int) -> str:
        """The text given to the processor beside so many pictures."""
        ...

    def __call__(self, line: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Prompt token ids int32 [T], each picture's tokens among them, and the pictures' tree, leaves [M, ...]."""
        ...

    def torch(self, images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch's pictures, leaves [B, M, ...], as the arrays that the PyTorch model takes."""
        ...


@dataclass(frozen=True, kw_only=True)
class Files:
    """How a family's safetensors files spell what its table names.

    Attributes:
        head: tensor of the head.
        tokens: tensor of the token table.
        renames: patterns of other releases' names, and what stands for them in ours.
        ignored: patterns of tensors that nothing reads.
        unread: (config, name) -> whether a tensor belongs to a layer that the model never runs.
        says_tied: config.json as it stands -> whether a head equal to the token table is that table.
        writes_head: config -> whether a tied head is written all the same.
    """

    head: str
    tokens: str
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    unread: Callable[[LMMConfig, str], bool] = lambda config, name: False
    says_tied: Callable[[Mapping[str, Any]], bool] = lambda raw: bool(raw.get("tie_word_embeddings", False))
    writes_head: Callable[[LMMConfig], bool] = lambda config: False


class Tiny(NamedTuple):
    """A small shape of a family, of which the conformance tests make a random PyTorch model.

    Attributes:
        fields: of its config.json, `architectures` among them; `<pad>` is 0, `</s>` 1 and the image token 3.
        own_head: whether the head differs from the token table although the config shares them.
    """

    fields: dict[str, Any]
    own_head: bool = False


class Depth:
    """What else changes in a family when layers go; here for families where nothing does."""

    def sizes(self, config: LMMConfig) -> dict[str, int]:
        """Axes of parameters that follow from others, which cannot be cut by themselves, with their sizes."""
        return {}

    def variants(self, config: LMMConfig, smaller: LMMConfig) -> list[LMMConfig]:
        """The configs that a cut to the sizes of `smaller` may leave: scores decide between several."""
        return [smaller]

    def reindex(self, config: LMMConfig, smaller: LMMConfig, keep: Keep) -> LMMConfig:
        """The config of the model that a keep leaves, beyond its sizes.

        Args:
            config: the model that is cut.
            smaller: the same with the kept counts.
            keep: axis -> indices.

        Returns:
            The config.

        Raises:
            AntgmmError: layers that no config of the family describes.
        """
        return smaller

    def array_keep(self, config: LMMConfig, keep: Keep) -> dict[str, np.ndarray]:
        """A keep as arrays of parameters need it: with the axes of `sizes`."""
        return dict(keep)

    def by_layer(self, config: LMMConfig, scores: dict[str, Any]) -> dict[str, Any]:
        """Squares summed by axis of the arrays, as squares by axis of the model."""
        return scores

    def choose(
        self, config: LMMConfig, axis: str, scores: np.ndarray, variants: Sequence[LMMConfig]
    ) -> np.ndarray | None:
        """The layers to keep where not any may stay.

        Args:
            config: the model that is cut.
            axis: a `*/layers` axis.
            scores: of its layers [L].
            variants: legal configs after the cut.

        Returns:
            int32 indices, ascending; None where the best by score may stay.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of Hugging Face models.

    How its records are read stands in `inputs.py` of its folder, which imports processors: the class `Inputs`, made of
    config and processor, and `new_processor` of config and tokenizer.

    Attributes:
        name: of its folder, and in records.
        model_types: values of `model_type` in config.json that it reads.
        config: its dataclass.
        from_hf: (hf with defaults filled in, config.json as it stands, tied=) -> config.
        to_hf: config -> the fields of config.json that the model's shape decides.
        build: (config, remat=, rngs=) -> the `LMM`, from the common parts and its own.
        weights: config -> every tensor of the file, read in both directions.
        files: how its files spell them.
        ties: config -> counts that one field of config.json holds for several axes.
        violations: config -> what keeps a shape from being served, each as a sentence.
        image_readers: config -> paths of the linear maps that read the image encoder's output.
        features: paths of the parameters that image features depend on.
        depth: what else changes when layers go.
        torch_ends: PyTorch model -> the modules whose outputs end its image phase and its prompt phase.
        tiny: seed -> small shapes by name, their sizes in part drawn at random, for the conformance tests.
        presets: models by name.
    """

    name: str
    model_types: tuple[str, ...]
    config: type[LMMConfig]
    from_hf: Callable[..., LMMConfig]
    to_hf: Callable[[Any], dict[str, Any]]
    build: Callable[..., Any]
    weights: Callable[[Any], list[Entry]]
    files: Files
    ties: Callable[[Any], tuple[Tie, ...]]
    violations: Callable[[Any], tuple[str, ...]]
    image_readers: Callable[[Any], tuple[str, ...]]
    features: tuple[str, ...] = ("vision",)
    depth: Depth = field(default_factory=Depth)
    torch_ends: Callable[[Any], tuple[Any, Any]]
    tiny: Callable[[int], dict[str, Tiny]]
    presets: Mapping[str, LMMConfig] = field(default_factory=dict)
