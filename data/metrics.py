"""Metrics of answers."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require

VERDICT = "verdict"
ENOUGH = 20
"""Records of a question type below which all answers may be different by chance."""


class TokenLosses(NamedTuple):
    """Losses of the right answers under a model.

    Attributes:
        sums: cross-entropy of each record's answer tokens in nats, summed.
        tokens: number of these tokens.
    """

    sums: Float[np.ndarray, " N"]
    tokens: Float[np.ndarray, " N"]


def normal(answer: str) -> str:
    """Normalises an answer for comparison: compatible characters (NFKC), lower case, single spaces.

    Tokenizers normalise characters too, some by NFC and some by NFKC, so an answer may come back in another form.
    """
    return " ".join(unicodedata.normalize("NFKC", answer).lower().split())


def _last(answer: str) -> str:
    """Last word of an answer: the class, in answers that state the evidence first."""
    words = normal(answer).split()
    return words[-1] if words else ""


def most_frequent(types: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Returns the exact match per question type of always giving the type's most frequent answer.

    Args:
        types: question type of each record.
        answers: its answer.
    """
    counted = _counted(types, answers).items()
    return {kind: counts.most_common(1)[0][1] / counts.total() for kind, counts in counted}


def varied(types: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Returns the share of different answers of each question type with at least `ENOUGH` records.

    Args:
        types: question type of each record.
        answers: its answer.
    """
    counted = _counted(types, answers).items()
    return {kind: len(counts) / counts.total() for kind, counts in counted if counts.total() >= ENOUGH}


def _counted(types: Sequence[str], answers: Sequence[str]) -> dict[str, Counter[str]]:
    """Question type -> number of each answer."""
    by_type: dict[str, Counter[str]] = {}
    for kind, answer in zip(types, answers, strict=True):
        by_type.setdefault(kind, Counter())[normal(answer)] += 1
    return by_type


def macro_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 over the classes that occur in the references (like scikit-learn's `f1_score` with these labels).

    Args:
        answers: predicted classes.
        references: true classes; at least one.

    Returns:
        0 to 1.
    """
    predicted, true = np.asarray(answers, dtype=object), np.asarray(references, dtype=object)
    scores = []
    for label in sorted(set(references)):
        hits = np.sum((predicted == label) & (true == label))
        scores.append(2 * hits / (np.sum(predicted == label) + np.sum(true == label)))
    return float(np.mean(scores))


class _Words:
    """Tokenizer for ROUGE: lower-case words, or single characters of scripts without spaces."""

    _alone = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    _word = re.compile(rf"[{_alone}]|[^\W_{_alone}]+")

    def tokenize(self, text: str) -> list[str]:
        return self._word.findall(text.lower())


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1 (Lin 2004), from the reference implementation `rouge-score` without stemming.

    Its own tokenizer only supports a to z and digits; ours supports all scripts, Chinese and Japanese by character.

    Args:
        answers: predicted answers.
        references: true answers; at least one.

    Returns:
        0 to 1.

    Raises:
        AntgmmError: rouge-score is not installed.
    """
    require("eval")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(references, answers, strict=True)
    return float(np.mean([scorer.score(true, predicted)["rougeL"].fmeasure for true, predicted in pairs]))


def _means(hits: np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    names = np.asarray(groups, dtype=object)
    return {name: float(hits[names == name].mean()) for name in dict.fromkeys(groups)}


def _loss_means(losses: TokenLosses, groups: Sequence[str]) -> dict[str, float]:
    """Mean per token of each group."""
    names = np.asarray(groups, dtype=object)
    inside = {name: names == name for name in dict.fromkeys(groups)}
    return {name: float(losses.sums[at].sum() / losses.tokens[at].sum()) for name, at in inside.items()}


def scores(
    types: Sequence[str],
    answers: Sequence[str],
    references: Sequence[str],
    *,
    slices: Sequence[str] = (),
    losses: TokenLosses | None = None,
) -> dict:
    """Computes all metrics of an evaluation, ignoring letter case and repeated spaces.

    Args:
        types: question type of each answer ("" for none).
        answers: answers of the model.
        references: correct answers.
        slices: slice of each record; empty without slices.
        losses: losses of the references; None if they are not known.

    Returns:
        `count`, `exact_match` (mean over question types), `exact_match_micro` (mean over answers), `final_token`
        (correct last words, mean over types), `rouge_l`, `by_type` (exact match per type); `verdict_f1` if there are
        verdict questions; `by_slice` (macro exact match per slice) if there are slices; `token_loss` (mean
        cross-entropy of the references' tokens in nats) and `token_loss_by_type` if `losses` is given. All other
        scores are from 0 to 1, except `count`.

    Raises:
        AntgmmError: there are no answers, or the lists have different lengths.
    """
    lengths = {len(types), len(answers), len(references), len(slices) or len(answers)}
    if lengths != {len(answers)} or not len(answers):
        raise AntgmmError(
            f"metrics need equally many types, answers and references, at least one; got {sorted(lengths)}"
        )
    pairs = list(zip(answers, references, strict=True))
    hits = np.array([normal(a) == normal(r) for a, r in pairs], float)
    ends = np.array([_last(a) == _last(r) for a, r in pairs], float)
    by_type = _means(hits, types)
    out = {
        "count": len(pairs),
        "exact_match": float(np.mean(list(by_type.values()))),
        "exact_match_micro": float(hits.mean()),
        "final_token": float(np.mean(list(_means(ends, types).values()))),
        "rouge_l": rouge_l(answers, references),
        "by_type": by_type,
    }
    verdicts = [place for place, kind in enumerate(types) if kind == VERDICT]
    if verdicts:
        out["verdict_f1"] = macro_f1([_last(answers[i]) for i in verdicts], [_last(references[i]) for i in verdicts])
    if losses is not None:
        out["token_loss"] = float(losses.sums.sum() / losses.tokens.sum())
        out["token_loss_by_type"] = _loss_means(losses, types)
    if len(slices):
        out["by_slice"] = {}
        for name in dict.fromkeys(slices):
            rows = [place for place, slice_name in enumerate(slices) if slice_name == name]
            inside = _means(hits[rows], [types[i] for i in rows])
            out["by_slice"][name] = float(np.mean(list(inside.values())))
    return out
