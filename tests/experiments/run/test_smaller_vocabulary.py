"""`antgmm vocabulary`: logits of the kept tokens, answers and files against those of the whole model."""

import json

import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import vocabulary
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor
from data.maad import source
from experiments.cli import main
from experiments.run.export.export_gate import answer_logits
from experiments.run.rows.prompts import TEMPLATES
from experiments.run.rows.samples import Samples
from experiments.run.smaller_vocabulary import cut_vocabulary, used_tokens
from tests.experiments.tiny import save_llava, save_qwen3_vl, save_smolvlm, save_teacher
from tests.marks import long

ROWS = source("s", "train", 2)
SAVED = {"blip2": save_teacher, "llava": save_llava, "smolvlm": save_smolvlm, "qwen3_vl": save_qwen3_vl}
NAMES = [name if name == "llava" else long(name) for name in SAVED]
SIZE = 232


@pytest.fixture(scope="module", params=NAMES)
def folders(request, tmp_path_factory):
    """A model, and the same with the tokens of two rows."""
    place = tmp_path_factory.mktemp("models")
    whole = SAVED[request.param](place / "whole")
    (whole / "tekken.json").write_text("{}")  # another form of the whole tokenizer, which servers prefer
    figures = cut_vocabulary(whole, ROWS, place / "small", size=SIZE)
    return whole, place / "small", figures


def read(folder, rows=ROWS):
    config, params = load_hf(folder)
    return config, params, Samples(rows, load_processor(folder), config)


def test_logits_of_kept_tokens_are_those_of_the_whole_model(folders):
    (config, params, samples), (smaller, few, after) = (read(folder) for folder in folders[:2])
    (whole,), (small,) = ([*each.in_order(2)] for each in (samples, after))
    kept = kept_ids(folders)
    before = np.asarray(answer_logits(config, params, whole, whole["positions"]))[..., kept]
    np.testing.assert_allclose(answer_logits(smaller, few, small, small["positions"]), before, atol=1e-5)
    assert smaller.language.vocab == len(kept) < config.language.vocab


def kept_ids(folders):
    """Ids of the kept tokens in the whole model, by their names; ids without a name are not kept."""
    before, after = (load_processor(folder).tokenizer for folder in folders[:2])
    return before.convert_tokens_to_ids(after.convert_ids_to_tokens(range(len(after))))


def test_files_name_the_same_tokens(folders):
    before, after = (load_processor(folder).tokenizer for folder in folders[:2])
    ends, new = (read(folder)[2].end_tokens for folder in folders[:2])
    assert before.convert_ids_to_tokens(ends) == after.convert_ids_to_tokens(new)
    old, few = (json.loads((folder / "config.json").read_text()) for folder in folders[:2])
    named = [key for key in few if key.startswith("image_token_i")]
    assert named
    for key in named:
        assert before.convert_ids_to_tokens(old[key]) == after.convert_ids_to_tokens(few[key])
    assert before.special_tokens_map == after.special_tokens_map
    assert not (folders[1] / "tekken.json").exists()


def test_figures(folders):
    (config, params, _), (smaller, few, _) = (read(folder) for folder in folders[:2])
    figures, processor = folders[2], load_processor(folders[0])
    prompted = [Samples(ROWS, processor, config, prompt=template) for template in TEMPLATES]
    assert figures["tokens"] == {
        "before": config.language.vocab,
        "used": len(set().union(*map(used_tokens, prompted))),
        "after": smaller.language.vocab,
    }
    removed = params["language"]["tokens"].size - few["language"]["tokens"].size
    assert figures["params"]["before"] - figures["params"]["after"] >= removed > 0
    assert figures["gate"]["answers_equal"] == 1


def test_a_model_that_records_no_prompt_reads_rows_in_each_that_is_compared_later(folders):
    assert not any((folder / "antgmm.json").exists() for folder in folders[:2])
    (config, _, _), (smaller, _, _), kept = *(read(folder) for folder in folders[:2]), np.array(kept_ids(folders))
    processors = [load_processor(folder) for folder in folders[:2]]
    for template in TEMPLATES:
        before, after = (
            Samples(ROWS, processor, of, prompt=template).rows
            for processor, of in zip(processors, (config, smaller), strict=True)
        )
        for row in range(2):
            np.testing.assert_array_equal(kept[after.tokens(row)["prompt"]], before.tokens(row)["prompt"])


def test_a_recorded_prompt_is_kept_and_its_tokens_alone_are_needed(tmp_path):
    whole, prompt = save_llava(tmp_path / "whole"), {"prompt": "{question}[ ({text})]"}
    (whole / "antgmm.json").write_text(json.dumps(prompt))
    samples = Samples(ROWS, load_processor(whole), load_hf(whole)[0], **prompt)
    figures = cut_vocabulary(whole, ROWS, tmp_path / "small", size=SIZE)
    assert json.loads((tmp_path / "small" / "antgmm.json").read_text()) == prompt
    assert figures["tokens"]["used"] == len(used_tokens(samples))


def test_other_rows_can_still_be_read(folders):
    _, _, after = read(folders[1], source("s", "test", 4))
    decoded = load_processor(folders[1]).tokenizer.decode(after.rows.tokens(3)["answer"], skip_special_tokens=True)
    assert decoded.strip() == source("s", "test", 4)[3].answer


def test_bad_input(tmp_path, capsys):
    whole = save_teacher(tmp_path / "whole")

    def refused(*words):
        with pytest.raises(SystemExit) as stopped:
            main(["vocabulary", str(whole), "--out", str(tmp_path / "small"), *words])
        assert stopped.value.code == 2
        assert not (tmp_path / "small").exists()
        return capsys.readouterr().err

    assert "choose fewer with --tokens" in refused("--data", "maad:s:train", "--samples", "400", "--tokens", "256")
    assert "special tokens need" in refused("--data", "maad:s:train", "--samples", "2", "--tokens", "5")
    assert "write it as maad:TIER:SPLIT" in refused("--data", "rows.jsonl")


def test_a_tokenizer_that_splits_rows_otherwise_is_refused(tmp_path, monkeypatch):
    whole, cut = save_teacher(tmp_path / "whole"), vocabulary.smaller_tokenizer

    def without_merges(tokenizer, kept):
        result = cut(tokenizer, kept)
        return {**result, "model": {**result["model"], "merges": result["model"]["merges"][:2]}}

    monkeypatch.setattr(vocabulary, "smaller_tokenizer", without_merges)
    with pytest.raises(AntgmmError, match="this tokenizer cannot be cut"):
        cut_vocabulary(whole, ROWS, tmp_path / "small", size=SIZE)
    assert not (tmp_path / "small").exists()


def test_an_existing_folder_stays(tmp_path):
    (tmp_path / "small").mkdir()
    with pytest.raises(AntgmmError, match="exists"):
        cut_vocabulary(tmp_path / "whole", ROWS, tmp_path / "small", size=SIZE)


def test_a_special_token_beyond_the_vocabulary_stays_beyond_it(tmp_path):
    """The tokenizer of the released InternVL3 has one token more than its model: `<video>`."""
    whole = save_llava(tmp_path / "whole")
    config, processor = load_hf(whole)[0], load_processor(whole)
    words = processor.tokenizer
    more = [f"<more{number}>" for number in range(config.language.vocab - len(words) + 1)]
    words.add_special_tokens({"additional_special_tokens": more})
    assert words.convert_tokens_to_ids(more[-1]) == config.language.vocab == len(words) - 1
    processor.save_pretrained(whole)
    figures = cut_vocabulary(whole, ROWS, tmp_path / "small", size=SIZE)
    smaller, _, samples = read(tmp_path / "small")
    after = samples.encoder.inputs.processor.tokenizer
    assert after.convert_tokens_to_ids(more[-1]) == smaller.language.vocab == len(after) - 1
    assert figures["tokens"]["after"] == smaller.language.vocab == SIZE
