"""A run's report in one table."""

import os

from rich.console import Console

from experiments.report.closing import summary


def figures_and_lines():
    """The report of a run, and a function that returns the lines of its summary."""
    model = {"params": 8_400_000, "flops": 2e8, "exact_match": 0.988}
    small = {"params": 700_000, "flops": 1e7, "exact_match": 0.97}
    model["exact_match_hard"], small["exact_match_hard"] = 0.8, 0.75
    model["scores"], small["scores"] = {"rouge_l": 0.4}, {"rouge_l": 0.375}
    model["scores_hard"], small["scores_hard"] = {"rouge_l": 0.3}, {"rouge_l": 0.25}
    figures = {
        "free_text": False,
        "teacher": model,
        "student": small,
        "latency": {
            engine: {
                "teacher_ms": teacher_ms,
                "student_ms": student_ms,
                **{
                    name: {"energy": {"joules": j, "source": "estimated"}}
                    for name, j in (("teacher", 3), ("student", 1))
                },
            }
            for engine, teacher_ms, student_ms in (("jax", 12.0, 4.0), ("torch", 40.0, 20.0))
        },
        "export": {"answers_equal": 1.0, "ties": 0, "prompts": 320, "passed": True},
    }

    def lines():
        console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(summary(figures))
        console.file.close()
        return console.export_text().splitlines()

    return figures, lines


def shown(lines, *words):
    """Whether the line that begins with the first words has the others."""
    line = next(line for line in lines if words[0] in line)
    return all(word in line for word in words)


def test_the_summary_shows_teacher_and_student_side_by_side():
    _, lines = figures_and_lines()
    for words in (
        ("parameters", "8.4 M", "700 k", "12.0x"),
        ("latency in JAX", "12.0 ms", "3.0x"),
        ("energy per request in PyTorch, estimated", "3 J", "1 J", "3.0x"),
        ("exact match (macro)", "-1.8 points"),
        ("hard records", "0.8000", "-5.0 points"),
    ):
        assert shown(lines(), *words)
    assert "tie" not in "".join(lines())


def test_the_summary_of_free_text_shows_rouge_l():
    figures, lines = figures_and_lines()
    figures["free_text"] = True
    assert shown(lines(), "ROUGE-L", "0.4000", "0.3750", "-2.5 points")
    assert shown(lines(), "hard records", "0.3000", "0.2500", "-5.0 points")
    assert "exact match" not in "".join(lines())


def test_the_summary_counts_ties():
    figures, lines = figures_and_lines()
    figures["export"]["ties"] = 2
    assert shown(lines(), "100 % of 320 answers equal (2 of them up to a tie)")
