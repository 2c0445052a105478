"""Laws of the pages: what a model wrote never becomes markup, and equal reports are equal bytes."""

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_pipeline.report.build import build_comparison
from distill_pipeline.report.charts import accuracy_png, funnel_png, loss_curve_png
from distill_pipeline.report.funnel import filter_facts
from distill_pipeline.report.html import comparison_html, student_html, write_comparison, write_student_report
from distill_pipeline.report.markdown import comparison_markdown, comparison_text, student_markdown
from distill_pipeline.report.text import markdown_text, one_line, visible_text

MakeReport = Callable[..., dict[str, Any]]
MakeEvaluation = Callable[..., dict[str, Any]]

HOSTILE = [
    "<script>alert(1)</script>",
    "</div></article></main><img src=x onerror=alert(1)>",
    "\"><svg onload=alert(1)>' onmouseover='x",
    "[click](javascript:alert(1)) ![x](https://evil.example/p.png) https://evil.example www.evil.example",
    "| a | b |\n|---|---|\n`code` **bold** # head\n- item\n1. item\n> quote\n~~gone~~ ***\n```\nfence\n```",
    "nul \x00 bell \x07 escape \x1b[31mred\x1b[0m delete \x7f",
    "\u202eevil\u202c \u2066isolate\u2069 \u200e\u200f zero\u200bwidth \ufeff",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; &amp; &#60;b&#62; <!-- comment --> ]]> <![CDATA[",
    "x" * 100_000,
    "\ud800 lone surrogate",
]
MEANT_ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "section", "footer", "article", "div", "p", "span", "b",
    "h1", "h2", "h3", "ul", "ol", "li", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "small", "svg", "rect",
    "line", "path", "figure", "details", "summary",
}  # fmt: skip
MEANT_ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "class", "role", "aria-label", "aria-hidden", "scope", "colspan",
    "height", "width", "x", "y", "x1", "x2", "y1", "y2", "rx", "d", "viewbox", "preserveaspectratio",
}  # fmt: skip


class Page(HTMLParser):
    """Elements and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def _filter_facts(text: str) -> dict[str, Any]:
    stages = {"prompts": 3, "completions": 3, "finished": 3, "scored": 2, "accepted": 1}
    sample = {"completion_id": text, "prompt": text, "answer": text, "detail": text}
    return {
        "funnel": {text: stages, "d": stages}, "domain_reasons": {text: {text: 2}, "d": {"refusal": 2}},
        "pass_at": {"1": {"mean": 0.5, "prompts": 2}}, "accepted_per_prompt": {"0": 2, "1": 1},
        "samples": {text: [sample], "refusal": [sample]},
    }  # fmt: skip


def _reports(make_report: MakeReport, make_evaluation: MakeEvaluation, text: str) -> dict[str, Any]:
    """A report in which everything that a model, a file or a licence table can say is ``text``."""
    spoken = {"answer": text, "prompt": text, "target": text}
    evaluations = {
        "student": make_evaluation(20, n=40, **spoken), "teacher": make_evaluation(30, n=40, **spoken),
        "untrained": make_evaluation(2, n=40, **spoken),
    }  # fmt: skip
    teacher = {
        "name": text, "model": text, "revision": text, "license": text, "verdict": text, "clause": text, "obligations": [text],
        "accepted_because": text,
    }  # fmt: skip
    return make_report(
        evaluations=evaluations, teachers=[teacher], training={text: text}, input_versions={text: text}, packages={text: text},
        filters={
            "t/f": {"counts": {"completions": 3, "accepted": 1}, "reject_reasons": {text: 2}, "facts": _filter_facts(text)},
            text: {"counts": {"completions": 3, "accepted": 1}, "facts": _filter_facts(text)},
        },
        init={"model": text}, held_out={"student": {"forward_kl": None, "top1_agreement": None, "tokens": 0, "reason": text}},
        lineage=[{"name": text, "version": text, "counts": {text: 1}}],
    )  # fmt: skip


@pytest.fixture(scope="module", params=range(len(HOSTILE)), ids=lambda index: f"text{index}")
def hostile(request: pytest.FixtureRequest) -> str:
    """One text that tries to be more than text."""
    return HOSTILE[request.param]


def _shape(page: Page) -> tuple[list[str], list[str]]:
    return page.elements, [name for name, _ in page.attributes]


def test_hostile_text_adds_no_element_and_no_attribute(
    make_report: MakeReport, make_evaluation: MakeEvaluation, hostile: str
) -> None:
    harmless, report = (_reports(make_report, make_evaluation, text) for text in ("harmless", hostile))
    for render in (student_html, lambda found: comparison_html(build_comparison([found]))):
        page = Page(render(report))
        assert set(page.elements) <= MEANT_ELEMENTS
        assert {name for name, _ in page.attributes} <= MEANT_ATTRIBUTES
        assert _shape(page) == _shape(Page(render(harmless)))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.sampled_from("<>\"'&/=! \nscriptimgonerror{}%#|`\x00\u202e"), min_size=1, max_size=60))
def test_any_text_adds_no_element_and_no_attribute(make_report: MakeReport, make_evaluation: MakeEvaluation, text: str) -> None:
    page = Page(student_html(_reports(make_report, make_evaluation, text)))
    assert _shape(page) == _shape(Page(student_html(_reports(make_report, make_evaluation, "harmless"))))


def test_hostile_text_can_be_read_as_it_was_written(make_report: MakeReport, make_evaluation: MakeEvaluation) -> None:
    text = "".join(Page(student_html(_reports(make_report, make_evaluation, HOSTILE[0]))).text)
    assert "<script>alert(1)</script>" in text


def test_no_control_or_direction_character_reaches_a_page_or_a_terminal(
    make_report: MakeReport, make_evaluation: MakeEvaluation, hostile: str
) -> None:
    report = _reports(make_report, make_evaluation, hostile)
    comparison = build_comparison([report])
    pages = [student_html(report), student_markdown(report), comparison_html(comparison), comparison_markdown(comparison)]
    for page in [*pages, comparison_text(comparison)]:
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
        assert len(page) < 400_000
        page.encode("utf-8")


def test_pages_ask_for_nothing_from_anywhere_and_allow_nothing(make_report: MakeReport) -> None:
    report = make_report()
    for text in (student_html(report), comparison_html(build_comparison([report]))):
        page = Page(text)
        names = {name for name, _ in page.attributes}
        assert not names & {"src", "href", "style", "srcset", "action"}
        assert "url(" not in text
        assert "@import" not in text
        policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "unsafe" not in policy


def test_equal_reports_give_equal_bytes(make_report: MakeReport, tmp_path: Path) -> None:
    write_student_report(make_report(), tmp_path / "a.html")
    write_student_report(json.loads(json.dumps(make_report())), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    write_comparison(build_comparison([make_report()]), tmp_path / "c.html")
    assert comparison_html(build_comparison([make_report()])) == (tmp_path / "c.html").read_text(encoding="utf-8")


def test_page_shows_scores_obligations_reasons_and_versions(make_report: MakeReport) -> None:
    text = " ".join("".join(Page(student_html(make_report())).text).split())
    for said in (
        "What the filter smollm2/verified decided",
        "pass@1 42.0 %, pass@4 80.0 %",
        "HTTP 500",
        "all domains",
        "41.7 %",
    ):
        assert said in text
    for said in ("50.0 %", "60.0 %", "81.8 %", "show 'Built with Qwen'", "below min score", "a" * 16, "✓ right", "✗ wrong"):
        assert said in text


def test_hostile_text_stays_one_cell_of_a_markdown_table(hostile: str) -> None:
    cell = markdown_text(hostile)
    assert "\n" not in cell
    assert "<" not in cell
    assert ">" not in cell
    assert not re.search(r"(?<!\\)[|`*_\[\]!~#]", cell)
    assert len(cell) < 800


def test_markdown_tables_have_as_many_cells_in_every_row(
    make_report: MakeReport, make_evaluation: MakeEvaluation, hostile: str
) -> None:
    report = _reports(make_report, make_evaluation, hostile)
    for block in student_markdown(report).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1


def test_visible_text_shows_what_it_cut_and_what_cannot_be_seen() -> None:
    assert visible_text("a\x00\u202eb") == "a\u2400⟨U+202E⟩b"
    assert visible_text("abcdef", 4) == "abcd … (2 more characters)"
    assert visible_text(None) == ""
    assert one_line("a\r\nb\u2028c") == "a ⏎ b ⏎ c"


def test_charts_are_small_pngs_and_leave_no_figure_behind(make_report: MakeReport) -> None:
    had_pyplot = "matplotlib.pyplot" in sys.modules
    long_curve = [{"step": step, "loss": 2.0 + (step % 7) / 10} for step in range(5000)]
    facts = make_report()["filters"]["smollm2/verified"]
    pages = [funnel_png(facts), funnel_png(filter_facts({})), funnel_png(filter_facts(_filter_facts("$x^{ \x00 <b>")))]
    for png in (loss_curve_png(long_curve), loss_curve_png([]), accuracy_png(make_report()), *pages):
        assert png.startswith(b"\x89PNG")
        assert len(png) < 60_000
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_what_training_measured_beside_losses_is_drawn(make_report: MakeReport) -> None:
    curve = [
        {"step": step, "loss": 3.0 / step, "held_out_kl": 4.0 / step if step % 2 == 0 else None,
         "held_out_top1": 0.5 if step % 2 == 0 else None, "tokens_per_second": 100.0 + step, "peak_memory_bytes": 2 * 10**9}
        for step in range(1, 9)
    ]  # fmt: skip
    page = student_html({**make_report(), "curve": curve})
    for said in ("KL to the teacher on held-out prompts", "held-out divergence from 2 to 0.5", "Same likeliest token as",
                 "Tokens a second from 101 at step 1 to 108 at step 8", "Most memory so far, GB from 2 at step 1"):  # fmt: skip
        assert said in page
    plain = student_html(make_report())
    assert "held-out divergence from" not in plain
    assert "Tokens a second" not in plain
    assert loss_curve_png(curve) != loss_curve_png([{"step": row["step"], "loss": row["loss"]} for row in curve])
