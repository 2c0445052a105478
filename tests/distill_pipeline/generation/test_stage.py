"""Laws of the stage ``teacher_outputs``: conservation, content-addressed answers, and what a crash costs."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distill_pipeline.errors import BudgetError, EmptyResultError, GenerationError
from distill_pipeline.generation import spool
from distill_pipeline.generation.opening import greedy_engine
from distill_pipeline.generation.served import ServedModel
from distill_pipeline.generation.spec import SamplingSpec, ServerSpec, TeacherSpec
from distill_pipeline.generation.stage import generate_outputs, missing_requests
from distill_pipeline.models.resolve import ModelFolder, resolve_model
from distill_pipeline.outcome import Outcome, silent
from distill_pipeline.records import COMPLETION_SCHEMA, PROMPT_SCHEMA, prompt_id

SAMPLING = SamplingSpec(n=2, temperature=0.8, max_tokens=12)


def pool_batches(
    numbers: Any, *, domain: str = "sums", split: str = "train", text: str = "what is {} plus {}?"
) -> Iterator[pa.RecordBatch]:
    """A prompt pool in batches of 5 rows."""
    rows = []
    for number in numbers:
        messages = [{"role": "user", "content": text.format(number, number * number)}]
        rows.append(
            {
                "prompt_id": prompt_id(messages),
                "messages": messages,
                "reference": None,
                "domain": domain,
                "source": "test",
                "license": "cc0-1.0",
                "split": split,
                "metadata": "{}",
            }
        )
    yield from pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA).to_batches(max_chunksize=5)


class Bench:
    """Runs the stage with a tiny model in one generation store, each run with its own output folder."""

    def __init__(self, folder: Path, model: ModelFolder) -> None:
        self.folder, self.model, self.news = folder, model, list[str]()
        self.generations_dir = folder / "generations"
        self.generations_dir.mkdir(exist_ok=True)

    def run(
        self,
        batches: Any,
        *,
        name: str = "tiny",
        seed: int = 0,
        sampling: SamplingSpec = SAMPLING,
        flush_seconds: float = 30.0,
        **teacher: Any,
    ) -> Outcome:
        self.out_dir = self.folder / f"out{len(list(self.folder.glob('out*')))}"
        self.out_dir.mkdir()
        self.news.clear()
        return generate_outputs(
            batches,
            self.out_dir,
            teacher_name=name,
            teacher=TeacherSpec(model="tiny", sampling=sampling, **teacher),
            model=self.model,
            generations_dir=self.generations_dir,
            device="cpu",
            seed=seed,
            progress=self.news.append,
            flush_seconds=flush_seconds,
        )

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the last run."""
        parts = sorted(self.out_dir.glob("part-*.parquet"))
        return [row for part in parts for row in pq.read_table(part, schema=COMPLETION_SCHEMA).to_pylist()]


@pytest.fixture
def bench(tmp_path: Path, tiny_model_dir: Path) -> Bench:
    return Bench(tmp_path, resolve_model(str(tiny_model_dir), models_dir=tmp_path / "models", progress=lambda line: None))


def test_rows_are_n_per_training_prompt_in_the_pools_order_and_add_up(bench: Bench) -> None:
    batches = [
        *pool_batches(range(7)),
        *pool_batches(range(7, 9), split="heldout"),
        *pool_batches(range(9, 11), domain="other"),
    ]
    outcome = bench.run(batches, domains=("sums",))
    rows = bench.rows()
    expected = [row["prompt_id"] for batch in pool_batches(range(7)) for row in batch.to_pylist() for _ in range(2)]
    assert [row["prompt_id"] for row in rows] == expected
    assert [row["sample_index"] for row in rows] == [0, 1] * 7
    counts = outcome.counts
    assert (counts["prompts"], counts["samples_per_prompt"], counts["expected"], counts["generated"]) == (7, 2, 14, 14)
    assert counts["expected"] == counts["stopped"] + counts["truncated"] + counts["failed"] == len(rows)
    assert counts["stopped"] > 0 < counts["truncated"]
    assert len({row["completion_id"] for row in rows}) == len({row["request_key"] for row in rows}) == 14
    assert outcome.facts["completion_tokens"] == sum(row["completion_tokens"] for row in rows)
    assert all(row["answer"] == row["raw_text"].strip() and row["reasoning"] is None for row in rows)


def test_second_run_asks_nothing_and_gives_the_same_files(bench: Bench) -> None:
    bench.run(pool_batches(range(6)))
    first = (bench.out_dir / "part-00000.parquet").read_bytes()
    outcome = bench.run(pool_batches(range(6)))
    assert (outcome.counts["reused"], outcome.counts["generated"]) == (12, 0)
    assert outcome.facts["generated_tokens"] == 0
    assert (bench.out_dir / "part-00000.parquet").read_bytes() == first


def test_more_samples_pay_for_the_new_ones_only(bench: Bench) -> None:
    bench.run(pool_batches(range(6)))
    before = {row["request_key"]: row["raw_text"] for row in bench.rows()}
    outcome = bench.run(pool_batches(range(6)), sampling=SAMPLING.model_copy(update={"n": 8}))
    assert (outcome.counts["reused"], outcome.counts["generated"]) == (12, 36)
    after = {row["request_key"]: row["raw_text"] for row in bench.rows()}
    assert before.items() <= after.items()
    assert outcome.facts["settings_changed"] == {}


def test_missing_requests_are_those_the_next_run_sends_and_counting_writes_nothing(bench: Bench) -> None:
    prompts = [row for batch in pool_batches(range(6)) for row in batch.to_pylist()]
    more = SAMPLING.model_copy(update={"n": 8})

    def missing(sampling: SamplingSpec) -> int:
        return missing_requests(
            prompts,
            teacher=TeacherSpec(model="tiny", sampling=sampling),
            model=bench.model,
            generations_dir=bench.generations_dir,
            device="cpu",
            seed=0,
        )

    assert missing(SAMPLING) == 12
    assert not list(bench.generations_dir.iterdir())
    bench.run(pool_batches(range(6)))
    assert missing(SAMPLING) == 0
    assert missing(more) == bench.run(pool_batches(range(6)), sampling=more).counts["generated"] == 36


def test_new_reordered_and_removed_prompts_pay_for_the_new_ones_only(bench: Bench) -> None:
    bench.run(pool_batches(range(6)))
    outcome = bench.run(pool_batches([8, 5, 4, 9, 1]))
    assert (outcome.counts["reused"], outcome.counts["generated"]) == (6, 4)


def test_larger_max_tokens_redoes_only_what_was_cut(bench: Bench) -> None:
    first = bench.run(pool_batches(range(8)))
    stopped = {row["request_key"]: row for row in bench.rows() if row["finish_reason"] == "stop"}
    second = bench.run(pool_batches(range(8)), sampling=SAMPLING.model_copy(update={"max_tokens": 24}))
    assert second.counts["generated"] == first.counts["truncated"] > 0
    assert second.counts["reused"] == first.counts["stopped"] == len(stopped)
    again = {row["request_key"]: row for row in bench.rows()}
    assert all(again[key] == row for key, row in stopped.items())
    assert max(row["completion_tokens"] for row in again.values()) > 12


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sampling": SAMPLING.model_copy(update={"temperature": 0.5})}, "temperature 0.8 -> 0.5"),
        ({"seed": 7}, "seed 0 -> 7"),
        ({"system": "be brief"}, "system None -> 'be brief'"),
    ],
)
def test_other_settings_redo_everything_and_say_so(bench: Bench, change: dict[str, Any], says: str) -> None:
    bench.run(pool_batches(range(4)))
    first = {row["request_key"] for row in bench.rows()}
    outcome = bench.run(pool_batches(range(4)), **change)
    assert (outcome.counts["reused"], outcome.counts["generated"]) == (0, 8)
    assert says in bench.news[0]
    assert "8 of 8 completions are made anew" in bench.news[0]
    assert set(outcome.facts["settings_changed"]) >= {says.split()[0]}
    assert not first & {row["request_key"] for row in bench.rows()}
    bench.run(pool_batches(range(4)), **change)
    assert "made anew" not in bench.news[0]


def test_other_settings_are_said_with_the_rows_they_redo_before_the_first_is_asked(bench: Bench) -> None:
    bench.run(pool_batches(range(4)))
    renewed = dataclasses.replace(bench.model, revision="another", identity="f" * 64)
    other = Bench(bench.folder, renewed)
    with pytest.raises(
        BudgetError, match=r"^the budget is reached: .* of max_tokens 1 are used, and the next request could cost"
    ):
        other.run(pool_batches(range(4)), budget={"max_tokens": 1})
    (said,) = other.news
    assert f"revision {bench.model.revision} -> 'another'" in said
    assert "so its earlier answers do not serve; 8 of 8 completions are made anew" in said


def test_tokens_of_the_domains_make_up_the_teachers(bench: Bench) -> None:
    facts = bench.run([*pool_batches(range(5)), *pool_batches(range(5, 8), domain="other")]).facts
    domains, rows = facts["domains"], bench.rows()
    assert (domains["sums"]["prompts"], domains["other"]["prompts"]) == (5, 3)
    assert (domains["sums"]["completions"], domains["other"]["completions"]) == (10, 6)
    assert domains["other"]["completion_tokens"] == sum(row["completion_tokens"] for row in rows[10:])
    for name in ("prompt_tokens", "completion_tokens", "generated_tokens"):
        assert facts[name] == domains["sums"][name] + domains["other"][name]
    again = bench.run([*pool_batches(range(5)), *pool_batches(range(5, 8), domain="other")]).facts["domains"]
    assert (again["sums"]["generated"], again["sums"]["completion_tokens"]) == (0, domains["sums"]["completion_tokens"])


def mixed_pool() -> list[pa.RecordBatch]:
    return [*pool_batches(range(3)), *pool_batches(range(20, 24), domain="words"), *pool_batches(range(3, 6))]


def test_another_system_prompt_of_one_domain_redoes_its_rows_and_says_so_and_no_others(bench: Bench) -> None:
    plain = bench.run(mixed_pool(), system="be brief")
    before = {row["request_key"]: row for row in bench.rows()}
    assert (plain.counts["generated"], plain.facts.get("families")) == (20, None)
    own = bench.run(mixed_pool(), system="be brief", systems={"words": "spell it"})
    assert (own.counts["reused"], own.counts["generated"]) == (12, 8)
    assert "system of words None -> 'spell it'" in bench.news[0]
    assert "8 of 20 completions are made anew" in bench.news[0]
    rows = bench.rows()
    order = [row["prompt_id"] for batch in mixed_pool() for row in batch.to_pylist() for _ in range(2)]
    assert [row["prompt_id"] for row in rows] == order
    kept = [row for row in rows if row["request_key"] in before]
    assert all(before[row["request_key"]] == row for row in kept)
    assert len(kept) == 12
    again = bench.run(mixed_pool(), system="be brief", systems={"words": "spell it"})
    assert (again.counts["reused"], again.counts["generated"]) == (20, 0)
    assert bench.rows() == rows


def test_a_domain_with_its_own_system_prompt_has_the_answers_of_a_teacher_with_that_one_for_everything(bench: Bench) -> None:
    bench.run(mixed_pool(), systems={"words": "spell it"})
    own = {row["request_key"]: row for row in bench.rows()}
    whole = bench.run(mixed_pool(), system="spell it")
    assert (whole.counts["reused"], whole.counts["generated"]) == (8, 12)
    assert sum(own.get(row["request_key"]) == row for row in bench.rows()) == 8
    kept = bench.run(mixed_pool(), system="other", systems={"words": "spell it"})
    assert (kept.counts["reused"], kept.counts["generated"]) == (8, 12), "the default's text is no part of the domain's keys"
    asked = missing_requests(
        [row for batch in mixed_pool() for row in batch.to_pylist()], model=bench.model, device="cpu", seed=0,
        generations_dir=bench.generations_dir,
        teacher=TeacherSpec(model="tiny", sampling=SAMPLING, systems={"words": "new", "sums": "other"}),
    )  # fmt: skip
    assert asked == 8


def test_a_budget_counts_what_all_families_of_a_teacher_cost(bench: Bench) -> None:
    options: dict[str, Any] = {"systems": {"words": "spell it"}, "budget": {"max_tokens": 100_000}}
    first = bench.run(mixed_pool(), **options)
    again = bench.run(mixed_pool(), **options)
    cost = first.facts["cost"]
    assert cost["paid_completion_tokens"] == first.facts["completion_tokens"]
    assert again.facts["cost"]["tokens_all_runs"] == cost["tokens_all_runs"] > 0


def test_chain_of_thought_is_a_line_of_every_system_prompt_and_so_of_every_key(bench: Bench) -> None:
    bench.run(mixed_pool(), system="be brief", systems={"words": None})
    outcome = bench.run(mixed_pool(), system="be brief", systems={"words": None}, chain_of_thought=True)
    assert outcome.counts["generated"] == 20
    assert outcome.facts["settings"]["system"].startswith("be brief\n\nBefore you answer, think step by step between <think>")
    assert outcome.facts["settings"]["system of words"].startswith("Before you answer")


def test_one_bad_prompt_costs_its_rows_and_is_asked_again(bench: Bench) -> None:
    long = list(pool_batches([1], text="very long " * 200 + "{} {}"))
    outcome = bench.run([*pool_batches(range(3)), *long])
    assert (outcome.counts["failed"], outcome.counts["generated"]) == (2, 6)
    assert outcome.facts["errors"] == {"prompt_too_long": 2}
    failed = bench.rows()[-1]
    assert (failed["finish_reason"], failed["answer"], failed["raw_text"], failed["logprob"]) == ("error", "", "", None)
    assert failed["error"].startswith("prompt_too_long: ")
    again = bench.run([*pool_batches(range(3)), *long])
    assert (again.counts["reused"], again.counts["failed"]) == (6, 2)


def test_run_in_which_everything_fails_is_an_error(bench: Bench) -> None:
    with pytest.raises(GenerationError, match=r"all 2 requests to tiny failed, the first with prompt_too_long"):
        bench.run(pool_batches([1], text="very long " * 200 + "{} {}"))


def test_teacher_without_prompts_is_an_error_that_names_the_domains(bench: Bench) -> None:
    with pytest.raises(EmptyResultError, match=r"domains law.*are in: sums\. Mend teachers\.tiny\.domains"):
        bench.run(pool_batches(range(3)), domains=("law",))


def test_windows_change_no_row(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench.run(pool_batches(range(11)))
    whole = bench.rows()
    other = tmp_path / "other"
    other.mkdir()
    small = Bench(other, bench.model)
    monkeypatch.setattr(spool, "WINDOW_PROMPTS", 3)
    small.run(pool_batches(range(11)))
    assert len(list(small.out_dir.glob("part-*.parquet"))) == 4
    texts = [[(row["request_key"], row["raw_text"], row["finish_reason"]) for row in rows] for rows in (small.rows(), whole)]
    assert texts[0] == texts[1]


STALLED_RUN = """
    import sys, importlib.util
    from pathlib import Path
    from distill_pipeline.generation import engine
    from distill_pipeline.models.resolve import ModelFolder
    spec = importlib.util.spec_from_file_location("laws", {test_file!r})
    laws = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(laws)
    run_batch, sizes = engine.TransformersEngine.run_batch, []

    def stalling(self, batch, **options):
        if len(sizes) == 4:
            print(sum(sizes), flush=True)
            sys.stdin.read()
        sizes.append(len(batch))
        return run_batch(self, batch, **options)

    engine.TransformersEngine.run_batch = stalling
    bench = laws.Bench(Path({folder!r}), ModelFolder(Path({model!r}), "tiny", None, {identity!r}, None))
    bench.run(laws.pool_batches(range(40)), batch_tokens=256, flush_seconds=0.0)
"""


def test_run_killed_in_the_middle_is_continued_to_the_same_rows_at_the_price_of_one_pass(tmp_path: Path, bench: Bench) -> None:
    code = textwrap.dedent(STALLED_RUN).format(
        test_file=__file__, folder=str(bench.folder), model=str(bench.model.path), identity=bench.model.identity
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    answered = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < answered < 80
    resumed = bench.run(pool_batches(range(40)), batch_tokens=256)
    assert (resumed.counts["reused"], resumed.counts["generated"]) == (answered, 80 - answered)
    rows = bench.rows()
    assert len(rows) == len({row["request_key"] for row in rows}) == 80
    (tmp_path / "undisturbed").mkdir()
    whole = Bench(tmp_path / "undisturbed", bench.model)
    whole.run(pool_batches(range(40)), batch_tokens=256)
    assert rows == whole.rows()


def test_progress_says_rows_speed_and_time_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_pipeline.generation import answering

    monkeypatch.setattr(answering, "PROGRESS_SECONDS", 0.0)
    started = time.monotonic()
    bench.run(pool_batches(range(30)), batch_tokens=256)
    assert bench.news[0] == "tiny: 0 of 60 completions are stored, 60 to make"
    assert "/60 completions, " in bench.news[1]
    assert "tokens/s" in bench.news[1]
    assert bench.news[1].endswith(" left")
    assert bench.news[-1].startswith("tiny: 60/60 completions")
    assert time.monotonic() - started < 30


def test_a_greedy_engine_draws_nothing_and_says_so_in_its_answers_family(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    here = resolve_model(str(tiny_teacher_dir), models_dir=tmp_path, progress=silent)
    served = ServedModel("m", None, ServerSpec(base_url=("http://127.0.0.1:1/v1",)))
    for model, top_k in ((here, 50), (served, None)):
        settings = greedy_engine(model, max_tokens=4, device="cpu").settings
        found = {name: settings[name] for name in ("temperature", "top_k", "top_p", "system", "seed", "model")}
        assert found == {
            "temperature": 0.0, "top_k": top_k, "top_p": 0.95, "system": None, "seed": 0, "model": model.identity
        }  # fmt: skip
