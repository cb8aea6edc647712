"""InstructBLIP beyond the suite: the instruction, the released configs, and what is refused."""

import copy

import jax
import numpy as np
import pytest
from transformers import ProcessorMixin

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import inputs, new_processor
from antgmm_jax.presets import PRESETS
from antgmm_jax.pure import functional
from data.encoding import Encoder
from data.record import Record
from data.source import InMemorySource
from data.store import open_encoded
from pruning import ones
from pruning.costs import cost
from tests.families.cases import batch, case_of, close, config_with, logits, read_fields, tokenizer
from tests.families.test_inputs import LINE, picture

INSTRUCT = "instructblip"


@pytest.fixture(scope="module", params=["T5", "Llama"])
def case(request, tmp_path_factory):
    return case_of(INSTRUCT, request.param, tmp_path_factory.getbasetemp())


def test_the_instruction_changes_the_image_features_and_its_padding_does_not(case):
    arrays = batch(case.config)
    images, words = arrays["images"], arrays["images"]["instruction"]
    features = jax.jit(functional(case.config).features)
    expected = np.asarray(features(case.params, images))
    other = {**images, "instruction": np.where(words >= 0, words + 1, words)}
    assert np.abs(np.asarray(features(case.params, other)) - expected).max() > 1e-2
    short = words[..., :6]
    padded = np.pad(short, ((0, 0), (0, 0), (0, 8)), constant_values=-1)
    alike = [np.asarray(features(case.params, {**images, "instruction": one})) for one in (short, padded)]
    close(*alike)


def test_collected_norms_count_the_tokens_of_each_part(case):
    """Norms of text units ignore the padding of the instruction; states are those of the queries."""
    config, arrays = case.config, batch(case.config)
    apply = jax.jit(functional(config).apply, static_argnames="collect")
    names = ("bridge/text_mlp", "bridge/mlp", "bridge/states")
    made = apply(case.params, arrays, ones(config), collect=names)
    stack, slots = config.bridge.stack, arrays["images"]["valid"].size
    assert made["bridge/text_mlp"].shape == (stack.layers, slots, stack.text_mlp)
    assert made["bridge/mlp"].shape == (stack.layers, slots, stack.mlp)
    assert made["bridge/states"].shape == (stack.layers + 1, slots, config.bridge.queries, stack.embed)
    short = arrays["images"]["instruction"][..., :6]
    padded = np.pad(short, ((0, 0), (0, 0), (0, 8)), constant_values=-1)
    trees = [{**arrays["images"], "instruction": one} for one in (short, padded)]
    alike = [apply(case.params, {**arrays, "images": tree}, ones(config), collect=names) for tree in trees]
    close(*(np.asarray(one["bridge/text_mlp"]) for one in alike))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "opt"}}, "instructblip with text_config.model_type = 'opt' is not supported"),
        ({"image_token_index": None}, "config.json has no image_token_index"),
        (
            {"image_token_index": 160},
            r"image_token_index = 160, but the token table has 160 rows: .* call `resize_token_embeddings\(",
        ),
        (
            {"vision_config": {"image_size": 4}},
            "image_size = 4 and patch_size = 8 must be one number each, and a patch fit",
        ),
    ],
    ids=str,
)
def test_unsupported_variants_are_refused_by_field_and_value(changes, message):
    with pytest.raises(AntgmmError, match=message) as error:
        config_with(INSTRUCT, "Llama", **changes)
    assert "\n" not in str(error.value)


def released(text: dict, image_token: int):
    """A config.json; fields that are not here have the defaults of transformers."""
    qformer = {"vocab_size": 30523}
    raw = {"model_type": INSTRUCT, "image_token_index": image_token, "text_config": text, "qformer_config": qformer}
    return read_fields(copy.deepcopy(raw))


def test_the_released_configs_are_the_presets():
    """The conversion to transformers names T5's activation, and adds [PAD] and <image> to Llama's 32000 tokens."""
    text = {"model_type": "t5", "d_model": 2048, "d_ff": 5120, "d_kv": 64, "num_layers": 24, "num_heads": 32}
    text |= {"num_decoder_layers": 24, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    text |= {"dense_act_fn": "gelu"}
    assert released({**text, "vocab_size": 32128}, 32100) == PRESETS["instructblip-flan-t5-xl"]
    text = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    assert released({**text, "vocab_size": 32064}, 32001) == PRESETS["instructblip-vicuna-7b"]


def test_long_instructions_and_foreign_tokenizers_are_refused(case):
    long = " ".join([LINE] * 2)
    with pytest.raises(AntgmmError, match="an instruction of 20 tokens: the Q-Former reads at most 14"):
        case.reads(long, [picture(16, 16)])
    ids, tree = case.reads(long, [])
    assert tree["instruction"].shape == (0, 14) and len(ids) > 14
    processor = new_processor(case.config, tokenizer())
    processor.qformer_tokenizer.add_tokens([f"w{place}" for place in range(40)])
    with pytest.raises(AntgmmError, match="the Q-Former's tokenizer has 5. tokens, the Q-Former 40"):
        inputs(case.config, processor)
    with pytest.raises(AntgmmError, match="needs a InstructBlipProcessor"):
        inputs(case.config, object.__new__(ProcessorMixin))


@pytest.mark.parametrize("drops", [True, False])
def test_rows_with_a_long_instruction_are_left_out_or_listed(case, drops, tmp_path):
    encode = Encoder(new_processor(case.config, tokenizer()), case.config, template="{question}")
    questions = {"a": LINE, "b": " ".join([LINE] * 2)}
    records = [Record(images=(picture(16, 16),), question=q, answer="$25.", id=name) for name, q in questions.items()]
    source = InMemorySource(records)
    source.drops_long = drops
    if drops:
        stored = open_encoded(source, encode, tmp_path)
        assert (len(stored), stored.dropped) == (1, 1)
        return
    with pytest.raises(AntgmmError) as refused:
        open_encoded(source, encode, tmp_path)
    head, line = str(refused.value).splitlines()
    assert head == "1 of 2 rows are too long; shorten or remove them"
    assert line == "b: instruction of 20 tokens, at most 14"


def test_the_costs_of_the_image_side_name_no_other_tower(case):
    flops = cost(case.config, 1, 8, 4).flops["vision"]
    assert set(flops) == {"vision", "bridge"} and all(count > 0 for count in flops.values())


def test_the_text_layer_of_the_last_layer_is_not_read(case):
    arrays, stack = batch(case.config), case.config.bridge.stack
    gate = np.ones((stack.layers, stack.text_mlp), np.float32)
    gate[-1] = 0
    closed = logits(case.config, case.params, arrays, {**ones(case.config), "bridge/text_mlp": gate})
    np.testing.assert_array_equal(closed, logits(case.config, case.params, arrays, ones(case.config)))
    gate[0] = 0
    less = logits(case.config, case.params, arrays, {**ones(case.config), "bridge/text_mlp": gate})
    assert np.abs(less - closed).max() > 1e-3
