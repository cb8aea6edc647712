"""The token loss of an evaluation is the cross-entropy that PyTorch computes of the right answers."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from antgmm_jax.families import torch_images
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor
from data import maad
from experiments.run.rows.samples import Samples
from experiments.run.scores.evaluation import evaluate, token_loss, too_long
from tests.experiments.tiny import save_llava, save_teacher
from tests.marks import long


@pytest.mark.parametrize("save", [save_llava, long(save_teacher)])
@pytest.mark.filterwarnings("default")  # of transformers
def test_the_token_loss_is_pytorchs_mean_over_the_tokens_of_the_right_answers(tmp_path, save, capsys):
    directory = save(tmp_path / "model")
    (config, params), processor = load_hf(directory), load_processor(directory)
    samples = Samples(maad.source("s", "test", 5), processor, config)
    scores = evaluate(config, params, samples, processor, max_new_tokens=1, batch_size=2)[0]
    assert too_long(samples.rows.index.answer, 1) in capsys.readouterr().err
    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    losses = {kind: [] for kind in scores["by_type"]}
    for batch in samples.in_order(1):
        given = {name: torch.from_numpy(np.int64(batch[name])) for name in ("input_ids", "attention_mask", "labels")}
        pictures = {name: torch.from_numpy(one) for name, one in torch_images(batch, model.config).items()}
        with torch.no_grad():
            logits = model(**given, **pictures).logits[0]
        labels = given["labels"][0] if config.encoder_decoder else given["labels"][0, 1:]
        values = torch.nn.functional.cross_entropy(logits[: len(labels)], labels, reduction="none")[labels >= 0]
        (row,) = batch["index"]
        losses[samples.records.words(int(row)).type] += values.tolist()
    expected = {kind: np.mean(values) for kind, values in losses.items()}
    assert scores["token_loss_by_type"] == pytest.approx(expected, rel=1e-5)
    assert scores["token_loss"] == pytest.approx(np.mean(np.concatenate([*losses.values()])), rel=1e-5)
    # Batches of unequal numbers of tokens: a mean of their means would differ.
    assert token_loss(config, params, samples, batch_size=2) == pytest.approx(scores["token_loss"], rel=1e-6)


def test_answers_that_are_too_long_to_be_given_are_counted():
    """Lengths have an end token, which an answer needs not reach to be right."""
    lengths = np.array([3, 5, 6, 9])
    assert too_long(lengths, 8) == ""
    assert too_long(lengths, 4) == (
        "2 of 4 right answers are longer than max_new_tokens = 4 and count as wrong: set max_new_tokens = 9"
        " (--max-new-tokens 9 of antgmm eval and export)"
    )
