"""Laws of generation on a real Ray cluster: it is the local run, with more hands."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distill_pipeline.compute.spec import ComputeSpec
from distill_pipeline.errors import BudgetError, ComputeError, IntegrityError
from distill_pipeline.generation import stage
from distill_pipeline.generation.cluster import ClusterEngine, EngineWorker, model_here
from distill_pipeline.generation.opening import open_engine
from distill_pipeline.generation.spec import BudgetSpec, SamplingSpec, TeacherSpec
from distill_pipeline.generation.stage import generate_outputs
from distill_pipeline.generation.store import GenerationStore
from distill_pipeline.models.resolve import ModelFolder, resolve_model
from distill_pipeline.outcome import Outcome, silent
from distill_pipeline.records import COMPLETION_SCHEMA, PROMPT_SCHEMA, prompt_id

ON_RAY = ComputeSpec(engine="ray", workers=2)
LONG = "very long " * 200


@pytest.fixture(autouse=True)
def _as_many_threads_as_an_actor() -> Iterator[None]:
    """Sums of floats depend on how many threads add them up: one here, as in an actor with one CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tiny_teacher_dir: Path, tmp_path: Path) -> ModelFolder:
    return resolve_model(str(tiny_teacher_dir), models_dir=tmp_path / "models", progress=silent)


class Bench:
    """Runs the stage in one generation store, each run with its own output folder."""

    def __init__(self, folder: Path, model: ModelFolder) -> None:
        self.folder, self.model, self.runs = folder, model, 0

    def run(self, numbers: Any, compute: ComputeSpec = ON_RAY, store: str = "ray", **teacher: Any) -> Outcome:
        self.out_dir, self.runs = self.folder / f"out{self.runs}", self.runs + 1
        self.out_dir.mkdir()
        sampling = SamplingSpec(n=2, temperature=0.8, max_tokens=12)
        return generate_outputs(
            [self.pool(numbers)], self.out_dir, teacher_name="tiny", model=self.model, seed=0, progress=silent, compute=compute,
            teacher=TeacherSpec(model="tiny", sampling=sampling, batch_tokens=256, **teacher), device="cpu",
            generations_dir=self.folder / store,
        )  # fmt: skip

    @staticmethod
    def pool(numbers: Any) -> pa.RecordBatch:
        rows = []
        for number in numbers:
            text = LONG if number == "long" else f"what is {number} plus {number * number}?"
            messages = [{"role": "user", "content": text}]
            rows.append(
                {"prompt_id": prompt_id(messages), "messages": messages, "reference": None, "domain": "sums", "source": "test",
                 "license": "cc0-1.0", "split": "train", "metadata": "{}"}
            )  # fmt: skip
        return pa.RecordBatch.from_pylist(rows, schema=PROMPT_SCHEMA)

    def rows(self) -> list[dict[str, Any]]:
        parts = sorted(self.out_dir.glob("part-*.parquet"))
        return [row for part in parts for row in pq.read_table(part, schema=COMPLETION_SCHEMA).to_pylist()]


@pytest.fixture
def bench(tmp_path: Path, model: ModelFolder) -> Bench:
    return Bench(tmp_path, model)


def test_a_cluster_gives_the_local_runs_rows_and_family_and_continues_it(bench: Bench, ray_cluster: None) -> None:
    numbers = [*range(30), "long"]
    local = bench.run(numbers, ComputeSpec(), store="local")
    expected = bench.rows()
    cluster = bench.run(numbers)
    assert bench.rows() == expected
    assert cluster.facts["family"] == local.facts["family"]
    assert cluster.counts == local.counts
    assert (cluster.counts["failed"], cluster.facts["errors"]) == (2, {"prompt_too_long": 2}), "a bad row is a row"
    paid = ("paid_prompt_tokens", "paid_completion_tokens", "requests")
    assert [cluster.facts["cost"][name] for name in paid] == [local.facts["cost"][name] for name in paid]
    assert (cluster.facts["workers"], cluster.facts["device"], cluster.facts["compute"]) == (2, "cpu", "ray")
    more = bench.run([*numbers, *range(30, 40)], store="local")
    assert (more.counts["reused"], more.counts["generated"]) == (60, 20)


def test_a_budget_holds_on_a_cluster_and_a_larger_one_pays_for_the_rest(bench: Bench, ray_cluster: None) -> None:
    with pytest.raises(BudgetError, match="the budget is reached"):
        bench.run(range(30), budget=BudgetSpec(max_tokens=700))
    (family,) = (path.parent.name for path in (bench.folder / "ray").glob("*/family.json"))
    assert 0 < GenerationStore(bench.folder / "ray", family, {}, max_tokens=12).paid.tokens <= 700
    done = bench.run(range(30), budget=BudgetSpec(max_tokens=100_000))
    assert 0 < done.counts["reused"] < 60
    assert done.counts["reused"] + done.counts["generated"] == 60


def test_an_actor_that_is_killed_is_started_again_and_no_row_is_lost(
    bench: Bench, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench.run(range(20), ComputeSpec(), store="local")
    expected, marker, folder = bench.rows(), tmp_path / "killed", bench.model

    def dying(name: str, teacher: TeacherSpec, *args: Any, **options: Any) -> ClusterEngine:
        engine = open_engine(name, teacher, folder, device="cpu", seed=0, compute=ON_RAY)
        assert isinstance(engine, ClusterEngine)
        open_here = engine._open_here

        def open_and_die_once() -> Any:
            opened = open_here()
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return opened

        engine._open_here = open_and_die_once
        return engine

    monkeypatch.setattr(stage, "open_engine", dying)
    bench.run(range(20))
    assert marker.exists()
    assert bench.rows() == expected


def test_an_actor_that_would_answer_otherwise_ends_the_run(bench: Bench, ray_cluster: None) -> None:
    teacher = TeacherSpec(model="tiny", sampling=SamplingSpec(n=1, max_tokens=4))
    engine = open_engine("t", teacher, bench.model, device="cpu", seed=0)
    with pytest.raises(ComputeError, match=r"would give other answers than the run that asks it: seed 7 and 0"):
        EngineWorker(lambda: engine, engine.settings | {"seed": 7})


def test_a_run_that_has_everything_joins_no_cluster(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.run(range(4), ComputeSpec(), store="local")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert bench.run(range(4), store="local").counts["reused"] == 8


def test_engines_that_do_not_fit_the_cluster_are_an_error_at_once(bench: Bench, ray_cluster: None) -> None:
    with pytest.raises(ComputeError, match=r"3 workers of 2 CPUs each were asked for, and the Ray cluster has room for 1"):
        bench.run(range(4), ComputeSpec(engine="ray", workers=3, cpus_per_engine=2))
    with pytest.raises(ComputeError, match=r"no workers of 1 CPUs and 1 GPUs each .* has room for 0"):
        bench.run(range(4), ComputeSpec(engine="ray", gpus_per_engine=1))


def test_a_folder_that_another_machine_lacks_is_an_error_that_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(ComputeError, match=r"is not on every machine of the Ray cluster\. Put it on a file system"):
        model_here(ModelFolder(tmp_path / "nowhere", "./nowhere", None, "i", None))


def test_a_model_fetched_there_must_be_the_drivers(model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_pipeline.generation import cluster

    monkeypatch.setattr(cluster, "resolve_model", lambda *args, **options: model)
    asked = ModelFolder(tmp_path / "nowhere", "a/b", "c" * 40, "another", None)
    with pytest.raises(IntegrityError, match=r"model a/b is another one on a machine of the cluster"):
        model_here(asked)
    assert model_here(ModelFolder(tmp_path / "nowhere", "a/b", "c" * 40, model.identity, None)) == model
