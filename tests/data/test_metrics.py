"""Metrics equal numbers computed by hand."""

import numpy as np
import pytest
from rouge_score.tokenizers import DefaultTokenizer

from antgmm_jax.errors import AntgmmError
from data import harness_functions
from data.metrics import TokenLosses, _Words, macro_f1, normal, rouge_l, scores


def test_exact_match_is_averaged_over_types():
    out = scores(["a", "a", "a", "b"], ["x", "y", "Z ", "no"], ["x", "x", "z", "yes"])
    assert out["by_type"] == pytest.approx({"a": 2 / 3, "b": 0.0})
    assert out["exact_match"] == pytest.approx(1 / 3)
    assert out["exact_match_micro"] == pytest.approx(0.5)
    assert out["count"] == 4
    assert "verdict_f1" not in out
    assert "by_slice" not in out


def test_the_final_token_is_scored_separately():
    out = scores(["m", "m"], ["picture $1 text $2 no", ""], ["picture $1 text $3 no", "yes"])
    assert out["exact_match"] == 0
    assert out["final_token"] == 0.5


@pytest.mark.parametrize(
    ("answer", "same"),
    [("cafe\u0301", "Caf\u00e9"), ("\uff11\uff12 kg", "12 kg"), ("\ufb01ne", "fine")],
)
def test_composed_and_compatible_characters_are_equal(answer, same):
    assert answer != same
    assert normal(answer) == normal(same) == harness_functions._normal(answer) == harness_functions._normal(same)
    assert scores(["a"], [answer], [same])["exact_match"] == 1
    assert harness_functions.scored({"answer": same, "type": "a"}, [answer])["exact_match_micro"] == 1


def test_macro_f1_by_hand():
    # R1: precision 1/2, recall 1: 2/3. pass: precision 1, recall 1/2: 2/3. R2: never predicted. R9: no true class.
    predicted = ["R1", "R1", "pass", "R9"]
    true = ["R1", "pass", "pass", "R2"]
    assert macro_f1(predicted, true) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    out = scores(["verdict"] * 4, [f"mug {x}" for x in predicted], [f"mug {x}" for x in true])
    assert out["verdict_f1"] == pytest.approx(4 / 9)


def test_rouge_l_by_hand():
    # "the cat sat" against "the cat was here": longest common subsequence 2, precision 2/3, recall 2/4.
    expected = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    assert rouge_l(["the cat sat"], ["the cat was here"]) == pytest.approx(expected)
    assert rouge_l(["same words", "none"], ["same words", "other"]) == pytest.approx(0.5)


def test_rouge_l_counts_words_of_any_script_and_equals_the_reference_in_english():
    # Two of the three Chinese characters in order: precision and recall 2/3.
    assert rouge_l(["好产品"], ["产品好"]) == pytest.approx(2 / 3)
    assert rouge_l(["цена 12"], ["цена 12"]) == 1.0
    english = "The price, $12.50, isn't what the text_says: NO-1 for 2!"
    assert _Words().tokenize(english) == DefaultTokenizer().tokenize(english)


def test_each_slice_has_its_own_macro_score():
    out = scores(
        ["a", "b", "a", "b"], ["1", "1", "1", "1"], ["1", "0", "1", "1"], slices=["font", "font", "jpeg", "jpeg"]
    )
    assert out["by_slice"] == {"font": 0.5, "jpeg": 1.0}


def test_nothing_or_uneven_lists_are_refused():
    with pytest.raises(AntgmmError, match="at least one"):
        scores([], [], [])
    with pytest.raises(AntgmmError, match="equally many"):
        scores(["a"], ["x", "y"], ["x", "y"])


def test_token_losses_are_averaged_over_tokens():
    losses = TokenLosses(np.array([3.0, 1.0, 2.0]), np.array([1.0, 3.0, 4.0]))
    out = scores(["a", "a", "b"], ["x"] * 3, ["x"] * 3, losses=losses)
    assert out["token_loss"] == 6 / 8
    assert out["token_loss_by_type"] == {"a": 1.0, "b": 0.5}
