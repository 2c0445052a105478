import dagster as dg
import pytest

from assets.metadata import CELL_CHARS, cell, escaped, facts_metadata, sample_table
from assets.naming import asset_key
from distill_pipeline.storage.artifacts import Making

INTERPRETED = ("<script", "![b]", "[a](", "`x`")
HOSTILE = "<script>alert(1)</script> | `x` [a](javascript:1) ![b](http://c)"


@pytest.fixture
def metadata(whole_run):
    def of(name: str) -> dict[str, dg.MetadataValue]:
        return dict(whole_run.get_latest_materialization_event(asset_key(name)).asset_materialization.metadata)

    return of


def test_counts_are_numbers_that_the_ui_can_plot(metadata):
    shown = metadata("filtered_set/smollm2/verified")
    assert shown["count_accepted"].value == 1
    assert shown["dagster/row_count"].value == 1
    assert shown["yield_frac"].value == 1.0


def test_a_filtered_set_shows_its_funnel_pass_rates_and_a_sample_of_each_reason(materialize, script):
    stages = {"prompts": 1, "completions": 2, "finished": 2, "scored": 2, "accepted": 1}
    sample = {"completion_id": "c2", "prompt": HOSTILE, "answer": HOSTILE, "detail": HOSTILE}
    script.facts["filtered_set/smollm2/verified"] = {
        "funnel": {HOSTILE: stages}, "domain_reasons": {HOSTILE: {"too_hard": 1}}, "samples": {"too_hard": [sample]},
        "pass_at": {"1": {"mean": 0.5, "prompts": 1}}, "accepted_per_prompt": {"1": 1},
    }  # fmt: skip
    result = materialize('+key:"filtered_set__smollm2__verified"')
    (event,) = (
        e for e in result.get_asset_materialization_events() if e.asset_key == asset_key("filtered_set/smollm2/verified")
    )
    shown = event.materialization.metadata
    assert shown["pass_at_1"].value == 0.5
    assert "| 1 | 2 | 2 | 2 | 1 | 50\\.0 % |" in shown["funnel"].value
    assert r"| too\_hard | 1 |" in shown["funnel"].value
    assert not any(sign in shown["funnel"].value for sign in INTERPRETED)
    assert shown["funnel_chart"].value.startswith("![stages")
    assert len(shown["funnel_chart"].value) < 100_000
    (record,) = shown["samples_by_reason"].records
    assert record.data["reason"] == "too_hard"
    assert "<script" in record.data["answer"]


def test_a_teachers_tokens_and_dollars_are_a_table_by_domain_largest_first(materialize, script):
    found = {"prompts": 1, "prompt_tokens": 10, "completion_tokens": 7, "usd": 0.25}
    script.facts["teacher_outputs/smollm2"] = {
        **script.facts.get("teacher_outputs/smollm2", {}),
        "domains": {
            "small": {"completions": 1, **found}, HOSTILE: {"completions": 9, **found},
            "free": {"completions": 0, **found, "usd": None},
        },
    }  # fmt: skip
    result = materialize('+key:"teacher_outputs__smollm2"')
    (event,) = (e for e in result.get_asset_materialization_events() if e.asset_key == asset_key("teacher_outputs/smollm2"))
    records = [record.data for record in event.materialization.metadata["tokens_by_domain"].records]
    assert [record["domain"] for record in records] == [cell(HOSTILE), "small", "free"]
    assert (records[1]["completion_tokens"], records[1]["usd"], records[2]["usd"]) == (7, 0.25, "")


def test_every_asset_says_where_it_lies_and_what_it_was_made_from(metadata):
    shown = metadata("student_checkpoint/kl")
    assert shown["dagster/uri"].value.endswith(f"/student_checkpoint/kl/{shown['version'].value}")
    for name in ("filtered", "teacher", "scored", "pool"):
        assert name in shown["lineage"].value


def test_the_training_curve_is_a_small_picture(metadata):
    picture = metadata("student_checkpoint/kl")["training_curve"].value
    assert picture.startswith("![loss by step](data:image/png;base64,")
    assert len(picture) < 100_000


def test_a_report_shows_its_baselines_and_the_comparison_every_student(metadata):
    report = metadata("eval_report/kl")["report"].value
    for line in (r"| student | 60\.0 %", r"| teacher | 80\.0 %", r"| untrained | 10\.0 %"):
        assert line in report
    assert metadata("eval_report/kl")["student_score"].value == 0.6
    leaderboard = metadata("comparison")["leaderboard"].value
    assert all(f"| {student} |" in leaderboard for student in ("kl", "sft", "scratch"))


@pytest.mark.parametrize("name", ["prompt_pool", "teacher_outputs/smollm2", "filtered_set/smollm2/verified"])
def test_text_of_models_is_shown_in_cells_of_tables(metadata, name):
    tables = [value for value in metadata(name).values() if isinstance(value, dg.TableMetadataValue)]
    assert any("<script" in str(record.data) for table in tables for record in table.records)


@pytest.mark.parametrize("name", ["prompt_pool", "teacher_outputs/smollm2", "filtered_set/smollm2/verified", "eval_report/kl"])
def test_no_text_of_a_model_is_markup_in_markdown(metadata, name):
    markdown = [value.value for value in metadata(name).values() if isinstance(value, dg.MarkdownMetadataValue)]
    assert not any(sign in text for sign in INTERPRETED for text in markdown)


def test_a_long_fact_stays_in_the_manifest(store):
    making = Making(experiment="e", spec={}, code_version="c", inputs={})
    facts = {"short": 1, "long": ["x" * 100] * 1000}
    with store.draft() as draft:
        artifact = store.commit(draft, "prompt_pool", making, counts={}, facts=facts)
    assert facts_metadata(artifact)["facts"].value == {"short": 1, "long": "long: see the manifest"}


def test_escaped_text_cannot_leave_its_table_cell():
    text = escaped("a | b <img src=x onerror=alert(1)> [x](javascript:1) \n| c")
    assert "<" not in text
    assert "\n" not in text
    assert all(text[i - 1] == "\\" for i, sign in enumerate(text) if sign in "|[]")


def test_long_cells_are_cut_and_nulls_are_empty():
    assert len(str(cell("x" * 10_000))) < CELL_CHARS + 40
    assert cell(None) == ""
    assert cell(0.5) == 0.5


def test_a_table_of_no_rows_is_still_a_table():
    assert sample_table([]).records == []
