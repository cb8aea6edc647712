"""How good answers are: pure functions from strings to figures."""

import re
from collections.abc import Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from antgmm_jax.errors import AntgmmError

VERDICT = "verdict"


def normal(answer: str) -> str:
    """An answer for comparison: lower case, single spaces."""
    return " ".join(answer.lower().split())


def _last(answer: str) -> str:
    """The last word: the answer class of an evidence-first answer."""
    words = normal(answer).split()
    return words[-1] if words else ""


def macro_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 over the classes that occur among the references (as scikit-learn's `f1_score` with those labels).

    Args:
        answers: predicted classes.
        references: true classes; at least one.

    Returns:
        0 to 1.
    """
    found, true = np.asarray(answers, dtype=object), np.asarray(references, dtype=object)
    scores = []
    for label in sorted(set(references)):
        hits = np.sum((found == label) & (true == label))
        scores.append(2 * hits / (np.sum(found == label) + np.sum(true == label)))
    return float(np.mean(scores))


class _Words:
    """Lower-case words; of text that is written without spaces each character."""

    _alone = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    _word = re.compile(rf"[{_alone}]|[^\W_{_alone}]+")

    def tokenize(self, text: str) -> list[str]:
        return self._word.findall(text.lower())


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1 (Lin 2004), with the reference implementation `rouge-score`, no stemming.

    Its own tokenizer knows a to z and digits alone; here words of any script count, Chinese and Japanese by character.

    Args:
        answers: predicted answers.
        references: true answers; at least one.

    Returns:
        0 to 1.
    """
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(references, answers, strict=True)
    return float(np.mean([scorer.score(true, found)["rougeL"].fmeasure for true, found in pairs]))


def _means(hits: np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    names = np.asarray(groups, dtype=object)
    return {name: float(hits[names == name].mean()) for name in dict.fromkeys(groups)}


def scores(
    types: Sequence[str], answers: Sequence[str], references: Sequence[str], *, slices: Sequence[str] = ()
) -> dict:
    """Every figure of an evaluation. Letter case and runs of spaces do not count.

    Args:
        types: question type of each answer ("" where there is none).
        answers: what the model said.
        references: what is right.
        slices: what is unusual about each record; empty for a set without slices.

    Returns:
        `count`, `exact_match` (mean over types of `by_type`), `exact_match_micro` (over answers), `final_token`
        (right last words, mean over types), `rouge_l`, `by_type`; `verdict_f1` where verdicts are asked;
        `by_slice` (macro exact match in each) where slices are given. All 0 to 1 but the count.

    Raises:
        AntgmmError: nothing to score, or lists of different lengths.
    """
    lengths = {len(types), len(answers), len(references), len(slices) or len(answers)}
    if lengths != {len(answers)} or not len(answers):
        raise AntgmmError(
            f"scores need equally many types, answers and references, at least one; got {sorted(lengths)}"
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
    if len(slices):
        out["by_slice"] = {}
        for name in dict.fromkeys(slices):
            rows = [place for place, found in enumerate(slices) if found == name]
            inside = _means(hits[rows], [types[i] for i in rows])
            out["by_slice"][name] = float(np.mean(list(inside.values())))
    return out
