"""The interface of a model family; other packages use a family only through it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from antgmm_jax.config import LMMConfig
from antgmm_jax.families.common.table import Entry
from antgmm_jax.families.common.words import Messages
from antgmm_jax.families.rules import Tie

if TYPE_CHECKING:
    import transformers

Keep = Mapping[str, np.ndarray]


@runtime_checkable
class Inputs(Protocol):
    """Turns a conversation with images into token ids and a tree of images, on the host.

    Attributes:
        processor: processor of the checkpoint, with its `tokenizer`.
        encoder_decoder: whether an encoder reads the prompt and a decoder the answer.
    """

    processor: "transformers.ProcessorMixin"
    encoder_decoder: bool

    def chat(self, messages: Messages) -> str:
        """Renders a conversation as text for the processor, by its chat template; see `words.rendered`."""
        ...

    def __call__(self, text: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Token ids int32 [T] of such a text, including image tokens, and the tree of images, leaves [M, ...]."""
        ...

    @staticmethod
    def torch(batch: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
        """Converts `images` of a batch (with `input_ids`) to arguments of the PyTorch model, given its config."""
        ...


@dataclass(frozen=True, kw_only=True)
class Files:
    """Tensor names in a family's safetensors files, beyond its table of weights.

    Attributes:
        head: tensor of the head.
        tokens: tensor of the token table, by language model; a file holds one of them.
        renames: (pattern, replacement) pairs that map the names of other releases to ours.
        ignored: patterns of tensors that are not needed.
        unread: (config, name) -> whether a tensor belongs to a layer that the model never runs.
        says_tied: config.json with defaults -> whether transformers ties a head that is missing, or equal to the token
            table.
        writes_head: config -> whether the file stores the head although it is tied.
    """

    head: str
    tokens: tuple[str, ...]
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    unread: Callable[[LMMConfig, str], bool] = lambda config, name: False
    says_tied: Callable[[Mapping[str, Any]], bool] = lambda hf: bool(hf["tie_word_embeddings"])
    writes_head: Callable[[LMMConfig], bool] = lambda config: False


class Tiny(NamedTuple):
    """A small model shape, from which the conformance tests create a random PyTorch model.

    Attributes:
        fields: contents of config.json, including `architectures`; `<pad>` is 0, `</s>` 1 and the image token 3.
        own_head: whether the head differs from the token table although the config ties them.
        another: whether the tests that run for the first shape of a family run for this one too.
    """

    fields: dict[str, Any]
    own_head: bool = False
    another: bool = False


def best_with(needed: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Returns the layers that are needed, and the best of the others.

    Args:
        needed: indices of layers, at most `count`.
        scores: scores of all layers [L].
        count: number of layers to keep.

    Returns:
        int32 indices [count], ascending.
    """
    order = np.argsort(-scores, kind="stable")
    others = order[~np.isin(order, needed)][: count - len(needed)]
    return np.sort(np.concatenate([needed, others])).astype(np.int32)


class Depth:
    """Hooks for families in which removing layers changes more than sizes; the defaults do nothing."""

    def sizes(self, config: LMMConfig) -> dict[str, int]:
        """Sizes of parameter axes that follow from other axes and cannot be pruned by themselves."""
        return {}

    def variants(self, config: LMMConfig, smaller: LMMConfig) -> list[LMMConfig]:
        """Configs that pruning to the sizes of `smaller` may result in; scores decide between them."""
        return [smaller]

    def reindex(self, config: LMMConfig, smaller: LMMConfig, keep: Keep) -> LMMConfig:
        """Adjusts the config of a pruned model beyond its sizes.

        Args:
            config: model before pruning.
            smaller: `config` with the sizes after pruning.
            keep: axis name -> kept indices.

        Returns:
            Config of the pruned model.

        Raises:
            AntgmmError: no config of the family describes the kept layers.
        """
        return smaller

    def array_keep(self, config: LMMConfig, keep: Keep) -> dict[str, np.ndarray]:
        """Adds kept indices of the axes of `sizes` to `keep`."""
        return dict(keep)

    def by_layer(self, config: LMMConfig, scores: dict[str, Any]) -> dict[str, Any]:
        """Maps sums of squares per parameter axis to those per model axis."""
        return scores

    def choose(
        self, config: LMMConfig, axis: str, scores: np.ndarray, variants: Sequence[LMMConfig]
    ) -> np.ndarray | None:
        """Chooses the layers to keep if not every set of layers is legal.

        Args:
            config: model before pruning.
            axis: a `*/layers` axis.
            scores: scores of its layers [L].
            variants: legal configs after pruning.

        Returns:
            int32 indices, ascending; None if any layers may be kept.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of Hugging Face models.

    Input processing is in `inputs.py` of the family's folder, because it imports processors: the class
    `Inputs(config, processor)` and the function `new_processor(config, tokenizer)`.

    Attributes:
        name: name of its folder, also used in records.
        model_types: supported values of `model_type` in config.json.
        config: its config dataclass.
        from_hf: (config.json with defaults, raw config.json, tied=) -> config.
        to_hf: config -> the fields of config.json that depend on the model's shape.
        build: (config, remat=) -> the `LMM`.
        weights: config -> conversion table of all tensors of the file.
        files: further tensor names of its files.
        ties: config -> sizes that share one field of config.json.
        violations: config -> reasons why transformers cannot load this shape.
        image_readers: config -> paths of the linear maps that read the image encoder's output; none if a norm does.
        features: paths of the parameters on which image features depend.
        depth: what else changes when layers are removed.
        image_tokens: (config, tree of a row's images) -> number of their positions in the text.
        torch_ends: PyTorch model -> modules whose outputs end its image phase and its prompt phase.
        without_images: config of the PyTorch model -> its arguments for a batch without images; empty if it needs none.
        vllm: config -> what to know when vLLM serves the model, "" for nothing; None if it does not.
        tiny: seed -> named small shapes with partly random sizes, for the conformance tests.
        presets: named models.
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
    image_tokens: Callable[[Any, Mapping[str, np.ndarray]], int] = lambda config, images: (
        config.image_tokens * len(next(iter(images.values()), ()))
    )
    torch_ends: Callable[[Any], tuple[Any, Any]]
    without_images: Callable[[Any], dict[str, np.ndarray]] = lambda config: {}
    vllm: Callable[[Any], str | None] = lambda config: None
    tiny: Callable[[int], dict[str, Tiny]]
    presets: Mapping[str, LMMConfig] = field(default_factory=dict)
