"""The report page escapes the output of models, loads nothing, and is displayed correctly by a browser."""

import base64
import copy
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from antgmm_jax.errors import AntgmmError
from experiments.report.as_html import page
from experiments.report.as_markdown import cell, markdown
from experiments.report.figures import choose, example
from experiments.report.plots import ticks
from experiments.report.write import FORMAT, PICTURE_SIDE, png, render

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</td></table></style></svg><h1>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; & &amp;",
    "<!-- -->]]>",
    "a | b \\| c `d` *e* _f_ [g](https://example.org/h)",
    "price 9 € 价格 \u202e",
]
REQUEST = {"prompt": 21, "slots": 1, "tokens": 5, "dtype": "bfloat16"}
VOID = {"meta", "img", "br", "link", "input", "hr", "area", "base", "col", "embed", "source", "track", "wbr"}


def model(params: int, exact_match: float) -> dict:
    scores = {
        "count": 40,
        "exact_match": exact_match,
        "final_token": exact_match,
        "rouge_l": exact_match,
        "by_type": {"price": exact_match, "": 0.5},
    }
    towers = {"vision": params // 2, "decoder": params - params // 2}
    return {
        "params": params,
        "params_by_tower": towers,
        "flops": 30 * params,
        "exact_match": exact_match,
        "scores": scores,
    }


def energy(kwh: float, seconds: float) -> dict:
    record = {"kwh": kwh, "kg_co2": kwh / 2, "seconds": seconds, "source": "estimated"}
    return {**record, "cpu_watts": 8.0, "gpu_watts": 0.0, "ram_watts": 20.0, "assumes": ["memory at 20 W", "500 g CO2"]}


def latency(scale: float) -> dict:
    times = {"p50": 6 * scale, "p95": 8 * scale, "vision": scale, "prefill": 2 * scale, "decode": 3 * scale}
    return {**times, "rounds": 30, "energy": {"joules": scale, "requests": 30, **energy(1e-6 * scale, 1.0)}}


def made(*, hard: bool = True) -> dict:
    """A report of two stages; the first one trained nothing."""
    engine = {"teacher": latency(1.0), "student": latency(0.3), "teacher_ms": 6.0, "student_ms": 1.8}
    curve = [{"step": step, "loss": 3.0 / step} for step in (1, 10, 20)]
    report = {
        "format": FORMAT,
        "recipe": "0123456789abcdef",
        "seed": 7,
        "machine": {"cpu": "A CPU", "cores": 2, "device": "cpu", "load": 0.5, "system": "Linux"},
        "free_text": False,
        "choices": [],
        "teacher": model(8_000_000, 0.95),
        "student": model(600_000, 0.93),
        "ratios": {"params": 13.3, "jax": 3.3, "torch": 3.3},
        "latency": {**REQUEST, "jax": engine, "torch": engine},
        "export": {
            "max_abs_logit_diff": 2e-5,
            "torch_rounding": 3e-5,
            "max_abs_logit": 15.0,
            "answers_equal": 1.0,
            "ties": 0,
            "prompts": 40,
            "passed": True,
        },
        "stages": [
            {
                **model(params, exact_match),
                "name": name,
                "latency": latency(scale),
                "history": history,
                "loss_first": history[0]["loss"] if history else None,
                "loss_last": history[-1]["loss"] if history else None,
                "energy": energy(0.002, 12.0),
            }
            for name, params, exact_match, scale, history in (
                ("blocks", 3_000_000, 0.8, 0.6, []),
                ("hidden", 600_000, 0.931, 0.3, curve),
            )
        ],
        "examples": [
            {
                "id": f"r-{place}",
                "type": "price",
                "question": "what price?",
                "text": "only now",
                "answer": "$5",
                "teacher": "$5",
                "teacher_right": True,
                "student": "$6" if place == 1 else "$5",
                "student_right": place != 1,
                "picture": f"ads/{place:02d}.png",
            }
            for place in (1, 2)
        ],
        "wall_seconds": 100.0,
        "energy": {
            "run": energy(0.007, 100.0),
            "cache": energy(0.001, 20.0),
            "saved": {
                "jax": {"joules": 0.7, "kwh_a_year": {"1": 6.132, "100": 613.2, "10000": 61320.0}, "payback": 36000},
                "torch": {"joules": -0.1, "kwh_a_year": {"1": -0.876, "100": -87.6, "10000": -8760.0}, "payback": None},
            },
        },
    }
    if hard:
        for name, value in (("teacher", 0.8), ("student", 0.7)):
            scores = {
                "count": 30,
                "exact_match": value,
                "rouge_l": value / 2,
                "by_type": {"price": value},
                "by_slice": {"font": value},
            }
            report[name] |= {"exact_match_hard": value, "scores_hard": scores}
    return report


def untimed() -> dict:
    """A report without latency."""
    report = made()
    report |= {"latency": REQUEST, "ratios": {"params": 13.3}, "energy": {**report["energy"], "saved": {}}}
    report["stages"] = [{**stage, "latency": None} for stage in report["stages"]]
    return report


def hostile() -> dict:
    """A report with texts of `HOSTILE` in all free fields."""
    report = made()
    report["machine"]["cpu"] = HOSTILE[0]
    for figures in (report["teacher"], report["student"], *report["stages"]):
        figures["scores"]["by_type"] = dict.fromkeys(HOSTILE, 0.5)
    for name in ("teacher", "student"):
        report[name]["scores_hard"]["by_slice"] = dict.fromkeys(HOSTILE, 0.5)
    plain = report["examples"][0]
    fields = ("id", "type", "question", "text", "answer", "teacher", "student")
    report["examples"] = [{**plain, **dict.fromkeys(fields, text)} for text in HOSTILE]
    return report


class Parsed(HTMLParser):
    """The elements of a page in order, each with its attributes and the names of its ancestors, and all text."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.text, self.open = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), [*self.open]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), [*self.open]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes, _ in self.elements if tag == name]

    def values(self, *names: str) -> list[str]:
        return [value for _, attributes, _ in self.elements for name, value in attributes.items() if name in names]


def picture(value: int = 0, side: int = 8) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A `report/` folder with the pictures of `made`."""
    directory = tmp_path / "report"
    (directory / "ads").mkdir(parents=True)
    for place in (1, 2):
        (directory / "ads" / f"{place:02d}.png").write_bytes(png(picture(100 * place)))
    return directory


@pytest.mark.parametrize("report", [made(), made(hard=False), hostile()], ids=["hard", "plain", "hostile"])
def test_the_page_loads_nothing_and_is_accessible(folder, report):
    html = page(report, folder)
    parsed = Parsed(html)
    assert html.startswith("<!DOCTYPE html>")
    loads = parsed.values("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background")
    assert loads and all(value.startswith(("data:image/png;base64,", "#")) for value in loads)
    assert not re.search(r"url\((?!#)|@import", html)
    assert not parsed.all("script") + parsed.all("link") + parsed.all("iframe") + parsed.all("object")
    assert not [name for _, attributes, _ in parsed.elements for name in attributes if name.startswith("on")]
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in loads if value[0] == "#"} <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)
    assert set(parsed.values("aria-labelledby")) <= set(ids)
    assert [attributes["lang"] for attributes in parsed.all("html")] == ["en"]
    assert len(parsed.all("h1")) == len(parsed.all("title")) - len(_titles_of_plots(parsed)) == 1
    assert all(attributes["alt"] for attributes in parsed.all("img"))
    # Two plots of quality, two of latency, one of the stage that was trained.
    assert [attributes["role"] for attributes in parsed.all("svg")] == ["img"] * 5
    assert all(attributes["aria-label"] for attributes in parsed.all("svg"))


def test_latency_that_was_not_measured_is_said_so(folder):
    report = untimed()
    text, html = markdown(report), page(report, folder)
    assert "| latency of a request | not measured | not measured | - |" in text
    assert "**13.3x fewer parameters, 2.0 points of macro exact match lost.**" in text
    assert not re.search("Latency of a request|Energy of a request|p95", text + html)
    assert len(Parsed(html).all("svg")) == 2  # quality against parameters, and one loss


def _titles_of_plots(parsed):
    return [1 for tag, _, inside in parsed.elements if tag == "title" and "svg" in inside]


def test_every_table_has_headers_for_its_columns_and_rows(folder):
    html = page(made(), folder)
    tables = re.findall(r"<table.*?</table>", html, re.DOTALL)
    assert len(tables) == 8
    for table in tables:
        head, *rows = [Parsed(row) for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)]
        columns = head.all("th")
        assert rows and all(attributes["scope"] == "col" for attributes in columns)
        assert all(text.strip() for text in head.text)
        for row in rows:
            assert [attributes["scope"] for attributes in row.all("th")] == ["row"]
            assert 1 + len(row.all("td")) == len(columns)


def test_output_of_models_is_escaped(folder):
    report = hostile()
    parsed, shown = Parsed(page(report, folder)), MarkdownIt("commonmark").enable("table").render(markdown(report))
    text = "".join(parsed.text)
    for output in HOSTILE:
        # An example's question, answer, teacher and student; a type and a slice.
        assert text.count(output) >= 6
    # Only elements and attributes of a harmless report occur.
    harmless = Parsed(page(made(), folder))
    assert {tag for tag, *_ in parsed.elements} <= {tag for tag, *_ in harmless.elements}
    assert {name for _, a, _ in parsed.elements for name in a} <= {name for _, a, _ in harmless.elements for name in a}
    assert not re.search("<(script|img|a|h1>.*<h1)", shown, re.DOTALL)


@given(st.lists(st.text(), min_size=1, max_size=3))
def test_a_cell_of_markdown_shows_its_text(texts):
    rows = "".join(f"| x | {cell(text)} |\n" for text in texts)
    shown = Parsed(MarkdownIt("commonmark").enable("table").render(f"| a | b |\n| --- | --- |\n{rows}"))
    assert {tag for tag, *_ in shown.elements} == {"table", "thead", "tbody", "tr", "th", "td"}
    words = "".join(shown.text).split()
    # Markdown shows U+FFFD for a null.
    assert words == ["a", "b", *(word for text in texts for word in ["x", *text.replace("\0", "\ufffd").split()])]


def test_right_and_wrong_answers_are_marked_in_words(folder):
    html = page(made(), folder)
    assert (html.count("✓ right"), html.count("✗ wrong")) == (3, 1)
    rows = [line for line in markdown(made()).splitlines() if line.startswith("| what price?")]
    assert rows == [
        "| what price? (price) | $5 | ✓ $5 | ✗ $6 |",
        "| what price? (price) | $5 | ✓ $5 | ✓ $5 |",
    ]


def test_hard_records_appear_only_if_they_were_scored(folder):
    plain, hard = made(hard=False), made()
    for text in (markdown(plain), page(plain, folder)):
        assert not re.search(r"\bhard\b|slice", text, re.IGNORECASE)
    for text in (markdown(hard), page(hard, folder)):
        assert "Exact match by hard slice" in text and "30 hard ones" in text
    assert "| … on hard records | 0.8000 | 0.7000 | -10.0 points |" in markdown(hard)
    assert "| font | 0.8000 | 0.7000 | -10.0 points |" in markdown(hard)


def test_stages_are_listed_with_their_figures():
    text = markdown(made())
    assert "| blocks | 3 M | 90 M | 0.8000 | 3.60 ms | - | 12 |" in text
    assert "| hidden | 600 k | 18 M | 0.9310 | 1.80 ms | 3.000 → 0.150 | 12 |" in text
    assert "| JAX blocks | 3.60 | 4.80 | 0.60 | 1.20 | 1.80 | 30 |" in text
    assert "PyTorch blocks" not in text
    assert "2.0 points of macro exact match lost" in text
    assert "Wall time of this run alone, including interrupted attempts: 100 s" in text


def test_the_page_says_in_which_dtype_and_of_which_request_latency_is(folder):
    for text in (markdown(made()), page(made(), folder)):
        assert "of a request in JAX in bfloat16" in text and "float32 parameters" not in text
        assert "at batch 1 in bfloat16, of the test record that is nearest to the median prompt" in text
        assert "(21 tokens, 1 image slots) with 5 answer tokens" in text
        assert "of the model only, without reading and resizing pictures and without tokenizing" in text
    assert "bfloat16" not in markdown(untimed())


def test_the_headline_of_free_text_is_rouge_l(folder):
    report = {**made(), "free_text": True}
    for name, value in (("teacher", 0.41), ("student", 0.382)):
        report[name]["scores"]["rouge_l"] = value
    for text in (markdown(report), page(report, folder)):
        assert "2.8 points of ROUGE-L lost" in text and "points of macro exact match" not in text


def test_choices_by_the_test_records_are_named(folder):
    assert "took part in choices" not in markdown(made())
    report = {**made(), "choices": ["the size", "<the prompt>"]}
    words = "The test records also took part in choices, so scores on other records may be lower: the size; "
    assert words in markdown(report)
    assert f"{words}&lt;the prompt&gt;." in page(report, folder)


def test_answers_that_are_equal_up_to_a_tie_are_counted(folder):
    report = made()
    assert "greedy answers have equal tokens." in markdown(report)
    report["export"]["ties"] = 3
    for text in (markdown(report), page(report, folder)):
        assert "100.0 % of 40 greedy answers have equal tokens (3 of them up to a tie)." in text


def test_a_loss_that_is_not_finite_is_said_so():
    report = made()
    report["teacher"]["scores"]["token_loss"], report["student"]["scores"]["token_loss"] = 0.5, 0.75
    assert "| token loss of the right answers | 0.5000 | 0.7500 | +0.2500 nats |" in markdown(report)
    report["student"]["scores"]["token_loss"] = None
    assert "| token loss of the right answers | 0.5000 | not finite | - |" in markdown(report)


def test_energy_of_requests_years_and_the_run_is_shown(folder):
    text, html = markdown(made()), page(made(), folder)
    # 1 J x 31 536 000 s / 3.6e6 J/kWh = 8.76 kWh.
    for row in (
        "| JAX teacher | 1 | estimated | 8.76 | 876 | 87.6 k |",
        "| PyTorch export | 0.3 | estimated | 2.63 | 263 | 26.3 k |",
        "| teacher cache | 0.001 | 0.0005 | 20 | 8 | 0 | 20 | estimated |",
        "| stage hidden | 0.002 | 0.001 | 12 | 8 | 0 | 20 | estimated |",
        "| whole run | 0.007 | 0.0035 | 100 | 8 | 0 | 20 | estimated |",
    ):
        assert row in text
    for words in (
        "0.7 J per request in JAX (energy of the run repaid after 36 k requests)",
        "-0.1 J per request in PyTorch (energy of the run never repaid)",
        "including idle power",
        "memory at 20 W; 500 g CO2.",
        "Energy of a request",
        "Energy of the compression",
        "A plan, a parent run and other students of a search are not included.",
    ):
        assert words in html and words in text


def test_equal_reports_give_equal_bytes(folder):
    assert page(made(), folder) == page(copy.deepcopy(made()), folder)


def test_pictures_are_embedded_in_the_page(folder):
    (folder / "ads" / "02.png").unlink()
    html = page(made(), folder)
    content = base64.b64decode(Parsed(html).all("img")[0]["src"].removeprefix("data:image/png;base64,"))
    assert np.asarray(Image.open(io.BytesIO(content))).tolist() == picture(100).tolist()
    assert html.count("<img") == html.count("The picture is missing.") == 1


def test_a_large_picture_is_scaled_down():
    assert Image.open(io.BytesIO(png(picture(side=900)))).size == (PICTURE_SIDE, PICTURE_SIDE)


def test_the_report_is_written_completely_or_refused(folder):
    text = render(folder, made())
    assert (folder / "report.md").read_text(encoding="utf-8") == text
    assert sorted(path.name for path in folder.iterdir()) == ["ads", "report.html", "report.md"]
    with pytest.raises(
        AntgmmError, match=r"report.json was written by another version: run the command of the run again"
    ):
        render(folder / "none", {**made(), "format": 1})
    assert not (folder / "none").exists()


def samples_of(listed):
    """A stand-in for `Samples` with the parts that the choice of examples reads."""

    class ListedSamples(list):
        records = SimpleNamespace(words=listed.__getitem__)

    return ListedSamples(listed)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 15))
def test_examples_show_wrong_answers_first_and_some_right_ones(fits, count):
    records = [
        SimpleNamespace(id=str(n), type="t", question="q", text="", answer="Five  euros", image=None)
        for n in range(len(fits))
    ]
    answers = {"student": ["five euros" if right else "six" for right in fits], "teacher": ["six"] * len(fits)}
    test = samples_of(records)
    chosen = choose(test, answers, count)
    assert len(chosen) == len(set(chosen)) <= count
    shown = [example(test, answers, index, place) for place, index in enumerate(chosen, 1)]
    right = [row["student_right"] for row in shown]
    assert right == sorted(right) == [fits[index] for index in chosen]
    assert len(shown) == min(count, len(fits))
    assert right.count(False) == min(fits.count(False), max(count // 2, count - fits.count(True)))
    assert not any(row["teacher_right"] for row in shown)
    assert len({row["picture"] for row in shown}) == len(shown)


@given(st.floats(1e-9, 1e12), st.floats(1.001, 1e9))
def test_ticks_are_few_and_within_the_range(low, ratio):
    values = ticks(low, low * ratio)
    assert len(values) <= 6
    assert values == sorted(set(values))
    assert all(low <= value <= low * ratio for value in values)
    if ratio >= 5:
        assert len(values) >= 2


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def browse(file, profile, *options: str) -> str:
    """What headless Chromium prints, with no network."""
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}"),
        *(*options, file.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: .ci/run installs it")
def test_a_browser_shows_the_page_without_a_network(folder, tmp_path):
    render(folder, hostile())
    file, profile = folder / "report.html", tmp_path / "profile"
    document = browse(file, profile, "--dump-dom")
    assert len(re.findall("<table", document)) == 8
    assert len(re.findall("<svg", document)) == 5
    assert "<script" not in document and document.count("<h1") == 1
    for width in (1200, 400):
        shot = tmp_path / f"{width}.png"
        browse(file, profile, f"--window-size={width},2400", f"--screenshot={shot}")
        pixels = np.asarray(Image.open(shot).convert("RGB"), int)
        assert pixels.shape[1] == width
        written = np.abs(pixels - pixels[0, 0]).sum(axis=2) > 60
        assert written.mean() > 0.01 and written.any(axis=1).mean() > 0.2
        # Wide content scrolls in its own frame, so the margins stay empty.
        assert not written[:, :12].any() and not written[:, -12:].any()
