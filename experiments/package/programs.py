"""A request as two PyTorch modules that `torch.export` traces: the first token of an answer, and each next one.

`generate` of `transformers` spends most of a small model's request in Python; the traced modules do the same without.
"""

import inspect
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import BaseModelOutput

State = tuple[Tensor, Tensor, list[list[Tensor]], list[list[Tensor]]]
"""State of a request between two tokens, a plain tuple so that a package loads without this module:

* the prompt's mask, int64 [B, L]; with the answer's places if the model has no encoder
* the position of the answer's first token, int64 [B]
* keys and values of every layer's self-attention, [B, H, N, D] each
* those of every layer's cross-attention; empty without an encoder
"""


class Start(nn.Module):
    """The first token of greedy answers.

    Args:
        model: from `in_torch.torch_model`.
        tokens: most tokens of an answer.
    """

    def __init__(self, model: Any, tokens: int):
        super().__init__()
        self.model, self.tokens = model, tokens

    def forward(self, **inputs: Tensor) -> tuple[Tensor, State]:
        """Computes the first token, int64 [B], from the inputs of the model by name."""
        model, part = self.model, generating(self.model)
        if part is model:
            return self._first(**inputs)
        # The model's `generate` embeds the prompt and calls that of its language model.
        with mock.patch.object(part, "generate", self._first):
            return model.generate(**inputs)

    def _first(self, *, attention_mask: Tensor, **inputs: Any) -> tuple[Tensor, State]:
        model, mask, cross = generating(self.model), attention_mask, DynamicCache()
        if "inputs_embeds" in inputs:
            inputs.pop("input_ids", None)
        if model.config.is_encoder_decoder:
            first = mask.new_full((len(mask), 1), model.config.decoder_start_token_id)
            inputs = {"decoder_input_ids": first, "encoder_outputs": model.get_encoder()(attention_mask=mask, **inputs)}
            own, place = _static(model.config, self.tokens), torch.zeros_like(mask[:, 0])
            cache = EncoderDecoderCache(own, cross)
        else:
            place, inputs["position_ids"] = mask.sum(1), (mask.cumsum(1) - 1).clamp(min=0)
            mask = torch.cat([mask, mask.new_ones(len(mask), self.tokens)], dim=1)
            own = cache = _static(model.config, mask.shape[1])
        out = model(**inputs, attention_mask=mask, use_cache=True, **{_cache_name(model): cache})
        return out.logits[:, -1].argmax(-1), (mask, place, _tensors(own), _tensors(cross))


class Next(nn.Module):
    """The next token of greedy answers.

    Args:
        model: the part of the model that generates, from `generating`.
        tokens: most tokens of an answer.
    """

    def __init__(self, model: Any, tokens: int):
        super().__init__()
        self.model, self.tokens = model, tokens

    def forward(self, token: Tensor, number: Tensor, state: State) -> tuple[Tensor, State]:
        """Computes the next token, int64 [B], from the last one and the number of tokens so far."""
        mask, place, layers, crossed = state
        config, length = self.model.config, layers[0][0].shape[2]
        own: Any = _static(config, length)
        cross = DynamicCache()
        # The decoder of an encoder has read the start token and the answer, other models the prompt and the answer.
        before = number if config.is_encoder_decoder else number - 1 + length - self.tokens
        for layer, (keys, values) in zip(own.layers, layers, strict=True):
            layer.keys, layer.values = keys.clone(), values.clone()
            layer.device, layer.is_initialized = keys.device, True
            layer.cumulative_length = before.clone()  # the layer adds to it in place
        for index, (keys, values) in enumerate(crossed):
            cross.update(keys, values, index)
        if config.is_encoder_decoder:
            # Only its shape is read: the keys and values of the encoder's output are in the cache.
            hidden = token.new_zeros((len(token), mask.shape[1], 1), dtype=layers[0][0].dtype)
            inputs = {"decoder_input_ids": token[:, None], "encoder_outputs": BaseModelOutput(hidden)}
            cache = EncoderDecoderCache(own, cross)
        else:
            inputs = {"input_ids": token[:, None], "position_ids": (place + number - 1)[:, None]}
            cache = own
        out = self.model(**inputs, attention_mask=mask, use_cache=True, **{_cache_name(self.model): cache})
        return out.logits[:, -1].argmax(-1), (mask, place, _tensors(own), crossed)


def _static(config: Any, length: int) -> Cache:
    """A cache of fixed size with all positions in every layer; the mask of local layers hides what they do not see.

    The cache of `transformers` for local layers holds the last positions alone, and counts them in a Python number that
    a traced program does not have.
    """
    return Cache(layers=[StaticLayer(max_cache_len=length) for _ in StaticCache(config, length).layers])


def generating(model: Any) -> Any:
    """Returns the part of a model that generates: itself, or a language model that is given the images' embeddings."""
    return model if {"cache", "past_key_values"} & _inputs(model) else model.language_model


def _inputs(model: Any) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


def _cache_name(model: Any) -> str:
    """Name of the cache in calls of a model: transformers renamed it."""
    return "cache" if "cache" in _inputs(model) else "past_key_values"


def _tensors(cache: Any) -> list[list[Tensor]]:
    return [[layer.keys, layer.values] for layer in cache.layers]
