"""A run's report in one table."""

import os

from rich.console import Console

from experiments.report.closing import summary


def test_the_summary_shows_teacher_and_student_side_by_side():
    model = {"params": 8_400_000, "flops": 2e8, "exact_match": 0.988}
    small = {"params": 700_000, "flops": 1e7, "exact_match": 0.97}
    model["exact_match_hard"], small["exact_match_hard"] = 0.8, 0.75
    figures = {
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
        "export": {"answers_equal": 1.0, "prompts": 320, "passed": True},
    }
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(summary(figures))
    console.file.close()
    text = console.export_text()
    for words in (
        ("parameters", "8.4 M", "700 k", "12.0x"),
        ("latency in JAX", "12.0 ms", "3.0x"),
        ("energy per request in PyTorch, estimated", "3 J", "1 J", "3.0x"),
        ("exact match (macro)", "-1.8 points"),
        ("hard records", "0.8000", "-5.0 points"),
    ):
        line = next(line for line in text.splitlines() if words[0] in line)
        assert all(word in line for word in words)
