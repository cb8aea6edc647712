"""The evidence of a run: what each stage did, how teacher and student answer, and how fast, as JSON and Markdown."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import ProcessorMixin

import pruning
from antgmm_jax import checkpoint
from antgmm_jax.config import LMMConfig, from_dict
from experiments.console import bar, say
from experiments.datasets import Samples
from experiments.evaluate import evaluate
from experiments.folder import RunFolder, write_json, write_text
from experiments.latency import Latency, Served, compare
from experiments.recipe import fingerprint
from experiments.schema import Recipe

LATENCY_REPEATS = 30


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return {"cpu": name, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "system": platform.platform()}


def write_report(
    folder: RunFolder,
    recipe: Recipe,
    teacher: Any,
    student: Any,
    test: Samples,
    processor: ProcessorMixin,
    began: float,
) -> dict[str, Any]:
    """Measures teacher and exported student and writes report/report.json and report/report.md.

    Args:
        folder: the run.
        recipe: its recipe.
        teacher: the `Student` that was cut.
        student: the `Student` read back from the exported files.
        test: records that scores are measured on.
        processor: the model's.
        began: when this process started the run, in seconds since the epoch.

    Returns:
        The report as JSON types.
    """
    answers, models = {}, {}
    for name, model in (("teacher", teacher), ("student", student)):
        with bar(f"{name} scores", len(test)) as update:
            scores, answers[name] = evaluate(
                model.config,
                model.params,
                test,
                processor,
                max_new_tokens=recipe.evaluate.max_new_tokens,
                progress=update,
            )
        models[name] = {**size_of(model.config, test), "exact_match": scores["exact_match"], "scores": scores}
    say("latency")
    latency = measure_latency(recipe.teacher.path, folder.export, teacher, student, test)
    report = {
        "recipe": fingerprint(recipe),
        "seed": recipe.seed,
        "machine": machine(),
        **models,
        "ratios": {
            "params": models["teacher"]["params"] / models["student"]["params"],
            **{
                engine: times["teacher"]["p50"] / times["student"]["p50"]
                for engine, times in latency.items()
                if engine != "tokens"
            },
        },
        "latency": flat_latency(latency),
        "export": export_figures(json.loads((folder.report / "gate.json").read_text())),
        "stages": [stage_figures(folder.stage(n, s.name), test) for n, s in enumerate(recipe.stages, 1)],
        "examples": examples(test, answers),
        "wall_seconds": time.time() - began,
    }
    write_json(folder.report / "report.json", report)
    write_text(folder.report / "report.md", markdown(report))
    return report


def size_of(config: LMMConfig, test: Samples) -> dict[str, Any]:
    """Parameters and FLOPs of one request of the test set's padded length, by tower and phase."""
    length = int(test.arrays["attention_mask"].sum(1).mean().round())
    answer = answer_length(test)
    cost = pruning.cost(config, 1, length, answer, itemsize=4)
    return {
        "params": sum(cost.parameters.values()),
        "params_by_tower": cost.parameters,
        "flops": sum(sum(towers.values()) for towers in cost.flops.values()),
        "flops_by_phase": {phase: sum(towers.values()) for phase, towers in cost.flops.items()},
        "kv_cache_bytes": cost.kv_cache,
    }


def answer_length(test: Samples) -> int:
    """Median answer length in tokens, end token included: what latency requests decode."""
    return int(np.median((test.arrays["targets"] != -100).sum(axis=1)))


def measure_latency(teacher_dir: str, student_dir: Path, teacher: Any, student: Any, test: Samples) -> dict[str, Any]:
    """Whole requests at batch 1, teacher and student in turn in the same engine, JAX then PyTorch.

    Args:
        teacher_dir: the teacher's Hugging Face directory.
        student_dir: the exported one.
        teacher: the teacher in JAX.
        student: the student in JAX.
        test: its first record is the request.

    Returns:
        engine -> model -> latency in milliseconds, and `tokens`, the answer length that both decode.
    """
    batch = next(test.in_order(1, prompts=True))
    length = int(batch["prompt/attention_mask"].sum())
    # A served request is not padded.
    prompt = {"pixel_values": batch["pixel_values"]}
    start = 0 if batch["prompt/attention_mask"][0, 0] else -length
    for name in ("input_ids", "attention_mask"):
        prompt[name] = batch[f"prompt/{name}"][:, start:][:, :length]
    tokens = answer_length(test)
    models = {
        "teacher": Served(teacher.config, teacher.params, teacher_dir, prompt),
        "student": Served(student.config, student.params, student_dir, prompt),
    }
    return {"tokens": tokens, **compare(models, tokens, LATENCY_REPEATS)}


def flat_latency(latency: dict[str, Any]) -> dict[str, Any]:
    """Latency with the medians also under `<model>_ms`, where scripts look for them."""
    flat: dict[str, Any] = {"tokens": latency["tokens"]}
    for engine in ("jax", "torch"):
        flat[engine] = dict(latency[engine])
        for model, times in latency[engine].items():
            flat[engine][f"{model}_ms"] = times["p50"]
    return flat


def export_figures(gate: dict[str, Any]) -> dict[str, Any]:
    """The gate's figures."""
    return {name: gate[name] for name in ("max_abs_logit_diff", "max_abs_logit", "answers_equal", "prompts", "passed")}


def stage_figures(directory: Path, test: Samples) -> dict[str, Any]:
    """What a finished stage left: sizes, losses at its start and end, scores."""
    record = checkpoint.load_record(directory)
    history = record["metrics"]["history"]
    return {
        "name": record["stage"]["name"],
        "sizes": record["stage"]["sizes"],
        **size_of(from_dict(record["config"]), test),
        "exact_match": record["metrics"]["scores"]["exact_match"],
        "scores": record["metrics"]["scores"],
        "loss_first": history[0]["loss"] if history else None,
        "loss_last": history[-1]["loss"] if history else None,
        "history": history,
        "seconds": record["metrics"]["seconds"],
    }


def examples(test: Samples, answers: dict[str, list[str]], count: int = 12) -> list[dict[str, str]]:
    """Questions with teacher's and student's answers, those where the student is wrong first."""
    rows = [
        {
            "id": record.id,
            "type": record.type,
            "question": record.question,
            "text": record.text,
            "answer": record.answer,
            "teacher": teacher,
            "student": student,
        }
        for record, teacher, student in zip(test.records, answers["teacher"], answers["student"], strict=True)
    ]
    wrong = [row for row in rows if row["student"] != row["answer"]]
    right = [row for row in rows if row["student"] == row["answer"]]
    return [*wrong[: count // 2], *right[: count - len(wrong[: count // 2])]]


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f} M"


def markdown(report: dict[str, Any]) -> str:
    """The report for people.

    Args:
        report: what `write_report` returns.

    Returns:
        Markdown.
    """
    teacher, student, latency = report["teacher"], report["student"], report["latency"]
    lost = 100 * (teacher["exact_match"] - student["exact_match"])
    whose, export = report["machine"], report["export"]
    lines = [
        "# Compression report",
        "",
        f"**{report['ratios']['params']:.1f}x fewer parameters, {report['ratios']['jax']:.1f}x lower latency in JAX and"
        f" {report['ratios']['torch']:.1f}x in PyTorch, {lost:.1f} points of macro exact match lost.**",
        "",
        f"Measured on {whose['cpu']}, {whose['cores']} cores, load {whose['load']}; seed {report['seed']};"
        f" {report['wall_seconds']:.0f} s since the run was last started.",
        "",
        "## Teacher and student",
        "",
        table(
            ["", "teacher", "student", "ratio"],
            [
                [
                    "parameters",
                    _millions(teacher["params"]),
                    _millions(student["params"]),
                    f"{report['ratios']['params']:.1f}",
                ],
                *(
                    [
                        f"… {tower}",
                        _millions(n),
                        _millions(student["params_by_tower"][tower]),
                        f"{n / student['params_by_tower'][tower]:.1f}",
                    ]
                    for tower, n in teacher["params_by_tower"].items()
                ),
                [
                    "FLOPs a request",
                    _millions(teacher["flops"]),
                    _millions(student["flops"]),
                    f"{teacher['flops'] / student['flops']:.1f}",
                ],
                ["exact match (macro)", f"{teacher['exact_match']:.4f}", f"{student['exact_match']:.4f}", ""],
                [
                    "final token",
                    f"{teacher['scores']['final_token']:.4f}",
                    f"{student['scores']['final_token']:.4f}",
                    "",
                ],
                ["ROUGE-L", f"{teacher['scores']['rouge_l']:.4f}", f"{student['scores']['rouge_l']:.4f}", ""],
            ],
        ),
        "",
        "## Latency of a request",
        "",
        f"Batch 1, {latency['tokens']} answer tokens for both, milliseconds; phases are medians;"
        " PyTorch with the number of threads that suits each model best.",
        "",
        table(["", "p50", "p95", "vision", "prefill", "decode"], _latency_rows(latency)),
        "",
        "## Stages",
        "",
        table(
            ["stage", "parameters", "FLOPs", "loss", "exact match", "seconds"],
            [
                [
                    s["name"],
                    _millions(s["params"]),
                    _millions(s["flops"]),
                    "-" if s["loss_first"] is None else f"{s['loss_first']:.3f} → {s['loss_last']:.3f}",
                    f"{s['exact_match']:.4f}",
                    f"{s['seconds']:.0f}",
                ]
                for s in report["stages"]
            ],
        ),
        "",
        "## Parameters by tower",
        "",
        table(["tower", "teacher", *(s["name"] for s in report["stages"])], _tower_rows(report)),
        "",
        "## Exact match by question type",
        "",
        table(["type", "teacher", *(s["name"] for s in report["stages"]), "exported student"], _type_rows(report)),
        "",
        "## Export gate",
        "",
        f"Plain `transformers` read the exported files in float32: logits differ by at most"
        f" {export['max_abs_logit_diff']:.2g} (largest magnitude {export['max_abs_logit']:.3g}),"
        f" {100 * export['answers_equal']:.1f} % of {export['prompts']} greedy answers are equal token for token.",
        "",
        "## Answers",
        "",
        table(
            ["question", "right", "teacher", "student"],
            [[f"{e['question']} ({e['type']})", e["answer"], e["teacher"], e["student"]] for e in report["examples"]],
        ),
        "",
    ]
    return "\n".join(lines)


def _latency_rows(latency: dict[str, Any]) -> list[list[Any]]:
    rows = []
    for engine in ("jax", "torch"):
        for model in ("teacher", "student"):
            times = latency[engine][model]
            rows.append([f"{engine} {model}", *(f"{times[name]:.2f}" for name in Latency._fields)])
    return rows


def _type_rows(report: dict[str, Any]) -> list[list[Any]]:
    columns = [report["teacher"], *report["stages"], report["student"]]
    types = sorted(report["teacher"]["scores"]["by_type"])
    return [[kind or "-", *(f"{c['scores']['by_type'][kind]:.3f}" for c in columns)] for kind in types]


def _tower_rows(report: dict[str, Any]) -> list[list[Any]]:
    columns = [report["teacher"], *report["stages"]]
    return [
        [tower, *(_millions(c["params_by_tower"][tower]) for c in columns)] for tower in columns[0]["params_by_tower"]
    ]
