"""The whole graph on tiny random models: what is done twice, what is done once, and what survives a kill -9."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from distill_pipeline.errors import EmptyResultError, MissingInputError
from distill_pipeline.experiment import load_experiment
from distill_pipeline.hashing import files_version
from distill_pipeline.launching import Launch
from distill_pipeline.lineage import lineage_lines, open_folder, trace
from distill_pipeline.pipeline import Pipeline, open_pipeline
from distill_pipeline.runners import UNHASHED_FILES
from distill_pipeline.storage.artifacts import Artifact, ArtifactStore

TASK = """\
task: tiny_heldout
custom_dataset: !function utils.load
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{reference}}"
process_results: !function utils.score
generation_kwargs: {do_sample: false, max_gen_toks: 4, until: []}
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
UTILS = """\
import json
from pathlib import Path

import datasets


def load(**_):
    lines = Path(__file__).with_name("heldout.jsonl").read_text().splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def score(doc, results):
    return {"acc": float(doc["reference"] in results[0])}
"""


CARDED = ("filtered_set/small/every", "student_checkpoint/scratch")
EAGER = """\
from functools import partial
import distill_pipeline.generation.stage as generation
import distill_pipeline.training.stage as training
generation.generate_outputs = partial(generation.generate_outputs, flush_rows=32)
training.train_student = partial(training.train_student, checkpoint_seconds=0.0)
from distill_pipeline.cli import main
main()
"""


class World:
    """A small experiment in a folder of its own."""

    def __init__(self, folder: Path, teacher: Path) -> None:
        self.folder = folder
        self.file = folder / "experiments" / "tiny.yaml"
        self.file.parent.mkdir(parents=True)
        self.root = folder / "data"
        tasks = folder / "tasks"
        tasks.mkdir()
        (tasks / "tiny_heldout.yaml").write_text(TASK)
        (tasks / "utils.py").write_text(UTILS)
        heldout = [{"prompt": f"held out question {n}", "reference": "a"} for n in range(6)]
        (tasks / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heldout))
        self.add_prompts(range(40))
        self.document: dict[str, Any] = {
            "name": "tiny",
            "prompt_pool": {"sources": [{"path": "prompts", "domain": "words", "license": "cc0-1.0"}], "holdout_fraction": 0.0},
            "teachers": {"small": {"model": str(teacher), "license": "mit",
                                   "sampling": {"n": 3, "temperature": 1.0, "max_tokens": 6}}},
            "scorers": {"words": [{"kind": "contains_answer"}]},
            "filters": {"every": {}, "strict": {"min_score": 1.0}},
            "students": {
                "kl": self._student("logit_kd", {"prune": {"layers": 2}}),
                "scratch": self._student("sft", {"scratch": {"layers": 2}}),
            },
            "evaluation": {"tasks": ["tiny_heldout"], "include_path": "tasks"},
        }  # fmt: skip
        self.save()

    @staticmethod
    def _student(method: str, init: dict[str, Any]) -> dict[str, Any]:
        return {"data": ["small/every"], "init": init, "stages": [{"method": method, "batch_prompts": 8, "lr": 1e-3}]}

    def add_prompts(self, numbers: range) -> None:
        lines = [json.dumps({"prompt": f"say the word number {n}", "reference": "e"}) + "\n" for n in numbers]
        (self.folder / "prompts").mkdir(exist_ok=True)
        (self.folder / "prompts" / f"from_{numbers.start}.jsonl").write_text("".join(lines))

    def add_two_teachers(self, other: Path) -> None:
        """A second domain of ten prompts, and a teacher for each of the two."""
        (self.folder / "sums").mkdir()
        lines = [json.dumps({"prompt": f"add {n} to {n * n}", "reference": "e"}) + "\n" for n in range(10)]
        (self.folder / "sums" / "prompts.jsonl").write_text("".join(lines))
        self.document["prompt_pool"]["sources"].append({"path": "sums", "domain": "sums", "license": "cc0-1.0"})
        small = self.document["teachers"]["small"]
        more = {"license": "apache-2.0", "domains": ["sums"], "systems": {"sums": "count"}}
        self.document["teachers"] = {
            "small": small | {"domains": ["words"], "system": "be brief"},
            "adder": small | {"model": str(other)} | more,
        }

    def save(self) -> None:
        self.file.write_text(yaml.safe_dump(self.document))

    def pipeline(self, **options: Any) -> Pipeline:
        options.setdefault("progress", lambda line: None)
        return Pipeline(load_experiment(self.file), ArtifactStore(self.root), **options)

    def make_all(self) -> dict[str, Artifact]:
        pipeline = self.pipeline()
        return {name: pipeline.make(name) for name in pipeline.nodes if not name.endswith("/strict")}

    def command(self, *words: str) -> subprocess.Popen[bytes]:
        """``distill`` on this experiment as a process of its own, which writes down what it has every few rows and steps."""
        line = [sys.executable, "-c", EAGER, words[0], str(self.file), *words[1:], "--root", str(self.root)]
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture
def world(tmp_path: Path, tiny_teacher_dir: Path) -> World:
    return World(tmp_path, tiny_teacher_dir)


def test_cards_tell_the_terms_and_make_no_version(world: World) -> None:
    def made(reason: str | None) -> list[Artifact]:
        world.document["teachers"]["small"] |= {"license": "llama3.1", "accept": reason}
        world.save()
        return [world.pipeline().make(name) for name in ("teacher_outputs/small", "scored_outputs/small", *CARDED)]

    world.pipeline().make("prompt_pool")
    *_, first_data, first_student = made(None)
    cards = [Path(artifact.uri, "README.md").read_text() for artifact in (first_data, first_student)]
    for artifact in (first_data, first_student):
        content = {entry.path: entry.sha256 for entry in artifact.manifest.files if entry.path not in UNHASHED_FILES}
        assert artifact.version == files_version(content), "cards are no content"
    assert "# Llama\\-tiny\\-scratch\n" in cards[1]
    assert first_student.manifest.facts["published_name"] == "Llama-tiny-scratch"
    assert all("the student's name begins with Llama" in card for card in cards)
    *_, data, student = made("so agreed in a letter")
    assert (data.version, student.version) == (first_data.version, first_student.version)
    again = [Path(artifact.uri, "README.md").read_text() for artifact in (data, student)]
    assert all("accepted because: so agreed in a letter" in card for card in again)
    said = "\n".join(lineage_lines(trace(open_folder(Path(student.uri)))))
    assert said.count("accepted because: so agreed in a letter") >= 2
    assert "[verified]" in said
    Path(student.uri, "README.md").write_text("another card")
    assert trace(open_folder(Path(student.uri))).first_difference is not None
    *_, data, student = made(None)
    assert [Path(artifact.uri, "README.md").read_text() for artifact in (data, student)] == cards, "equal work, equal cards"


def test_the_whole_graph_is_made_once_and_then_nothing_is_done(world: World) -> None:
    first = world.make_all()
    assert not any(artifact.reused for artifact in first.values())
    second = world.make_all()
    assert all(artifact.reused for artifact in second.values())
    assert {name: a.version for name, a in first.items()} == {name: a.version for name, a in second.items()}
    report = first["eval_report/kl"].read_json("report.json")
    needed = {"student", "teacher", "filter", "method", "parameters", "tasks", "gap_recovered", "yields", "input_versions"}
    assert needed <= set(report)
    assert len(first["comparison"].read_json("comparison.json")) == 2
    funnel = report["filters"]["small/every"]["funnel"]["words"]
    assert (funnel["prompts"], funnel["completions"], funnel["accepted"]) == (40, 120, 120)
    assert "What the filter small/every decided" in (first["eval_report/kl"].local_dir() / "report.html").read_text()
    leaderboard = first["comparison"].read_json("leaderboard.json")
    assert [row["name"] for row in leaderboard["filters"]] == ["small/every"]


def test_students_of_stored_signals_are_planned_made_once_and_traced(world: World) -> None:
    from distill_pipeline.lineage import lineage_lines, open_folder, trace
    from distill_pipeline.planning import plan_experiment

    for kind in ("topk", "sampled"):
        world.document["students"][kind] = recipe = world._student("logit_kd", {"prune": {"layers": 2}})
        recipe["stages"][0]["signal"] = kind
    world.document["signals"] = {"k": 8}
    world.save()
    lines = {line.node: line for line in plan_experiment(world.pipeline())}
    assert lines["teacher_signals/small/every"].num_bytes > 0
    assert "topk and sampled" in lines["teacher_signals/small/every"].note
    assert lines["student_checkpoint/topk"].seconds is not None
    first = world.make_all()
    assert all(artifact.reused for artifact in world.make_all().values())
    signals = first["teacher_signals/small/every"]
    assert signals.manifest.counts["captured"] == first["filtered_set/small/every"].manifest.counts["accepted"]
    assert set(signals.manifest.facts["bytes_a_token"]) == {"topk", "sampled-t1.0"}
    assert first["student_checkpoint/topk"].manifest.facts["teacher_sha256_before"] is None
    text = "\n".join(lineage_lines(trace(open_folder(world.root / "student_checkpoint" / "topk"))))
    assert f"teacher_signals/small/every  {signals.version}  [verified]" in text
    world.document["signals"]["k"] = 4
    world.save()
    with pytest.raises(MissingInputError, match="distill signals EXPERIMENT small/every"):
        world.pipeline().make("student_checkpoint/topk")


def test_a_measured_student_of_adapters_is_planned_made_once_and_reported(world: World) -> None:
    from distill_pipeline.planning import plan_experiment

    recipe = world.document["students"]["kl"]
    recipe |= {"held_out": {"fraction": 0.2, "every": 2}, "lora": {"rank": 2}, "gradient_checkpointing": True}
    recipe["stages"][0] |= {"early_stop": {"patience": 2}, "schedule": "wsd"}
    world.save()
    lines = {line.node: line for line in plan_experiment(world.pipeline())}
    assert lines["student_checkpoint/kl"].seconds is not None
    assert lines["student_checkpoint/kl"].rows < lines["student_checkpoint/scratch"].rows
    made = world.make_all()
    assert all(artifact.reused for artifact in world.make_all().values())
    student, report = made["student_checkpoint/kl"], made["eval_report/kl"]
    assert student.manifest.counts["held_out_rows"] > 0
    curve = report.read_json("report.json")["curve"]
    assert {"held_out_kl", "held_out_top1", "tokens_per_second", "peak_memory_bytes"} <= curve[-1].keys()
    assert "Same likeliest token as the teacher, held out" in (report.local_dir() / "report.html").read_text()
    again = world.pipeline(force=True).make("student_checkpoint/kl")
    assert again.version == student.version
    recipe["gradient_checkpointing"] = False
    world.save()
    assert world.pipeline().make("student_checkpoint/kl").reused


def test_two_teachers_answer_their_own_domains_and_a_student_of_both_has_each_row_from_its_teacher(
    world: World, tiny_model_dir: Path
) -> None:
    from distill_pipeline.lineage import lineage_lines, open_folder, trace

    world.add_two_teachers(tiny_model_dir)
    both = {"data": ["small/every", "adder/every"], "init": {"prune": {"layers": 2}}}
    world.document["students"] = {
        "texts": both | {"stages": [{"method": "sft", "batch_prompts": 8, "lr": 1e-3}]},
        "stored": both | {"stages": [{"method": "logit_kd", "signal": "topk", "batch_prompts": 8, "lr": 1e-3}]},
    }
    world.document["evaluation"]["domains"] = {"tiny_heldout": "words"}
    world.save()
    made = world.make_all()
    domains = {row["prompt_id"]: row["domain"] for row in made["prompt_pool"].rows()}
    for teacher, domain, prompts in (("small", "words", 40), ("adder", "sums", 10)):
        rows = list(made[f"teacher_outputs/{teacher}"].rows())
        assert len(rows) == 3 * prompts
        assert {(row["teacher"], domains[row["prompt_id"]]) for row in rows} == {(teacher, domain)}
        signals, outputs = (
            made[name].manifest.facts for name in (f"teacher_signals/{teacher}/every", f"teacher_outputs/{teacher}")
        )
        assert signals["headers"]["topk"]["teacher"] == outputs["teacher"]["identity"]
    for student in ("texts", "stored"):
        checkpoint = made[f"student_checkpoint/{student}"]
        assert checkpoint.manifest.counts["trained_completions"] == 3 * (40 + 10)
        terms = [(found["name"], found["license"]) for found in checkpoint.manifest.facts["teachers"]]
        assert terms == [("small", "mit"), ("adder", "apache-2.0")]
    text = "\n".join(lineage_lines(trace(open_folder(world.root / "student_checkpoint" / "texts"))))
    for found in made["student_checkpoint/texts"].manifest.facts["teachers"]:
        assert f"teacher {found['model']} ({found['license']}: {found['verdict']})" in text
    report = made["eval_report/texts"].read_json("report.json")
    assert report["teacher"] == "small+adder"
    assert {name: found["completions"] for name, found in report["yields"].items()} == {"small/every": 120, "adder/every": 30}
    assert {stage["stage"] for stage in report["funnel"]} > {"answers of adder", "answers of small"}
    assert [found["license"] for found in report["teachers"]] == ["mit", "apache-2.0"]
    assert report["held_out"]["student"]["forward_kl"] > 0
    leaderboard = made["comparison"].read_json("leaderboard.json")
    assert {row["name"]: (row["prompts"], row["completions"]) for row in leaderboard["filters"]} == {
        "small/every": (40, 120), "adder/every": (10, 30),
    }  # fmt: skip
    page = (made["comparison"].local_dir() / "comparison.html").read_text()
    assert "small/every" in page
    assert "adder/every" in page
    assert all(artifact.reused for artifact in world.make_all().values())


def test_a_system_prompt_may_be_left_out_so_that_it_becomes_part_of_the_weights(world: World) -> None:
    world.document["teachers"]["small"]["system"] = "be brief"
    told = world._student("sft", {"scratch": {"layers": 2}})
    world.document["students"] = {
        "told": told, "untold": told | {"system": "none"}, "answers": told | {"target": "both", "answer_weight": 0.3},
    }  # fmt: skip
    world.save()
    made = world.make_all()
    facts = {name: made[f"student_checkpoint/{name}"].manifest.facts for name in ("told", "untold", "answers")}
    assert facts["told"]["renderer"] == facts["answers"]["renderer"] != facts["untold"]["renderer"]
    for name in ("told", "answers"):
        assert made[f"eval_report/{name}"].read_json("report.json")["held_out"]["student"]["forward_kl"] is not None
    held_out = made["eval_report/untold"].read_json("report.json")["held_out"]["student"]
    assert (held_out["forward_kl"], held_out["reason"]) == (None, "it is never asked under the system prompts of its teacher")
    counts = made["student_checkpoint/answers"].manifest.counts
    assert (counts["reasoning_tokens"], counts["answer_tokens"]) == (0, counts["data_tokens"])


def test_ten_new_prompts_send_ten_to_the_teacher(world: World) -> None:
    for name in ("prompt_pool", "teacher_outputs/small"):
        world.pipeline().make(name)
    world.add_prompts(range(40, 50))
    for name in ("prompt_pool", "teacher_outputs/small"):
        artifact = world.pipeline().make(name)
    assert artifact.manifest.counts["generated"] == 10 * 3
    assert artifact.manifest.counts["reused"] == 40 * 3
    assert artifact.manifest.counts["expected"] == 50 * 3


def test_a_raised_threshold_leaves_the_teacher_and_other_filters_alone(world: World) -> None:
    world.make_all()
    world.document["filters"]["every"]["max_per_prompt"] = 1
    world.save()
    pipeline = world.pipeline()
    assert pipeline.make("teacher_outputs/small").reused
    assert pipeline.make("scored_outputs/small").reused
    with pytest.raises(MissingInputError, match=r"other settings.*distill filter EXPERIMENT small/every"):
        pipeline.make("student_checkpoint/kl")
    assert not pipeline.make("filtered_set/small/every").reused
    assert not pipeline.make("student_checkpoint/kl").reused


def test_a_filter_counts_tokens_with_the_model_it_names_and_depends_on_it(world: World, tiny_model_dir: Path) -> None:
    from distill_pipeline.models.load import load_tokenizer

    name, reference = "filtered_set/small/strict", str(tiny_model_dir)
    world.document["filters"]["strict"] = {"length": {"max_tokens": 4, "tokenizer": reference}}
    world.save()
    pipeline = world.pipeline()
    for before in ("prompt_pool", "teacher_outputs/small", "scored_outputs/small"):
        pipeline.make(before)
    artifact = pipeline.make(name)
    assert f"model:{reference}" in artifact.manifest.made.inputs
    tokenizer = load_tokenizer(tiny_model_dir)
    rows = list(artifact.rows())
    assert {row["reject_reason"] for row in rows} == {None, "too_long"}
    for row in rows:
        assert row["accepted"] == (len(tokenizer(row["raw_text"], add_special_tokens=False)["input_ids"]) <= 4)
    assert artifact.manifest.made.spec["filter"]["*"]["length"]["tokenizer"] == reference
    world.document["filters"]["strict"]["length"]["max_tokens"] = 5
    world.save()
    pipeline = world.pipeline()
    assert pipeline.make("scored_outputs/small").reused
    assert not pipeline.make(name).reused


def test_no_accepted_row_stops_before_any_training_also_in_a_later_run(world: World) -> None:
    world.document["students"]["kl"]["data"] = ["small/strict"]
    world.document["scorers"]["words"] = [{"kind": "exact"}]
    world.save()
    pipeline = world.pipeline()
    for name in ("prompt_pool", "teacher_outputs/small", "scored_outputs/small"):
        pipeline.make(name)
    for _ in range(2):
        with pytest.raises(EmptyResultError, match=r"0 of 120 teacher outputs passed. Largest reject reason: below_min_score"):
            world.pipeline().make("filtered_set/small/strict")
        with pytest.raises(Exception, match="0 of 120 teacher outputs passed"):
            world.pipeline().make("student_checkpoint/kl")
    assert not list(world.root.glob("student_checkpoint/*/*"))


def test_every_ancestor_of_a_student_is_in_its_own_folder(world: World) -> None:
    from distill_pipeline.lineage import lineage_lines, open_folder, trace

    world.make_all()
    story = trace(open_folder(world.root / "student_checkpoint" / "kl"))
    assert story.is_intact
    text = "\n".join(lineage_lines(story))
    names = ("student_checkpoint/kl", "filtered_set/small/every", "teacher_outputs/small", "prompt_pool")
    for part in (*names, "mit", "source:prompts/"):
        assert part in text
    for name in names:
        artifact = world.pipeline().store.latest(name)
        assert artifact is not None
        lines = text.splitlines()
        place = lines.index(f"{name}  {artifact.version}  [verified]")
        assert lines[place + 1].strip() == ", ".join(
            f"{key} {count:,}" for key, count in artifact.manifest.counts.items() if count
        )
    assert "(mit: allowed)" in text
    part = next((world.root / "teacher_outputs" / "small").glob("*/part-*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    broken = trace(open_folder(world.root / "student_checkpoint" / "kl"))
    assert not broken.is_intact
    assert any("part-" in line and "differs" in line for line in lineage_lines(broken))


def test_lineage_of_a_folder_that_was_copied_away_still_names_everything(world: World, tmp_path: Path) -> None:
    from distill_pipeline.lineage import lineage_lines, open_folder, trace

    artifact = world.make_all()["student_checkpoint/kl"]
    shutil.copytree(artifact.local_dir(), tmp_path / "elsewhere")
    story = trace(open_folder(tmp_path / "elsewhere"))
    assert story.own_state == "verified"
    assert {state for _, state in story.ancestors} == {"absent"}
    assert "teacher_outputs/small" in "\n".join(lineage_lines(story))


def _kill_when(process: subprocess.Popen[bytes], condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """kill -9 as soon as the condition holds; False when the process ended by itself first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        if condition():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.005)
    process.kill()
    raise AssertionError("the condition never came true")


EVERY_STEP = """\
import sys
if ["-m", "distill_pipeline.cli"] == sys.orig_argv[2:4]:
    from functools import partial
    import distill_pipeline.training.loop as loop
    import distill_pipeline.training.stage as training
    loop.CHECKPOINT_SHARE = float("inf")
    training.train_student = partial(training.train_student, checkpoint_seconds=0.0)
"""
"""Runs before the processes that torchrun starts: a checkpoint after every step."""


def _processes_that_train(file: Path) -> list[int]:
    """Process ids of all ``distill train`` on a file that torchrun started, in the order of their ranks."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            if words[2:5] == ["-m", "distill_pipeline.cli", "train"] and str(file) in words:
                variables = (folder / "environ").read_bytes().decode().split("\0")
                rank = next((word[5:] for word in variables if word.startswith("RANK=")), None)
                if rank is not None:
                    found[int(rank)] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def _last_step(root: Path) -> int:
    """Of the newest checkpoint."""
    return max((int(path.name[5:]) for path in root.glob(".work/student_checkpoint__kl/*/checkpoints/step-*")), default=0)


def _train_in_two(world: World, *, kill: int | None = None, shard: bool = False) -> tuple[int, str]:
    """Exit status and words of ``distill train --processes 2``; one of the two may be killed two checkpoints later."""
    line = [sys.executable, "-m", "distill_pipeline.cli", "train", str(world.file), "kl", "--root", str(world.root),
            "--processes", "2", *(["--shard"] if shard else [])]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{world.folder}:{os.getcwd()}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        before = _last_step(world.root)
        while kill is not None and process.poll() is None:
            if _last_step(world.root) > before + 1:
                os.kill(_processes_that_train(world.file)[kill], signal.SIGKILL)
                break
            time.sleep(0.005)
        assert process.stdout is not None
        said = process.stdout.read()
    return process.returncode, said


def test_two_processes_end_when_either_is_killed_and_later_ones_go_on_with_the_losses_of_one(
    world: World, tmp_path: Path, tiny_teacher_dir: Path
) -> None:
    world.document["students"]["kl"]["stages"][0] |= {"epochs": 12}
    world.save()
    (world.folder / "sitecustomize.py").write_text(EVERY_STEP)
    for name in ("prompt_pool", "teacher_outputs/small", "scored_outputs/small", "filtered_set/small/every"):
        world.pipeline().make(name)
    alone = World(tmp_path / "alone", tiny_teacher_dir)
    shutil.copytree(world.root, alone.root)
    alone.document = world.document
    alone.save()
    expected = alone.pipeline().make("student_checkpoint/kl")

    for rank in (1, 0):
        status, said = _train_in_two(world, kill=rank)
        assert status == 1
        assert said.count("Error: training ended with exit status 1 and no process said why") == 1
        assert _processes_that_train(world.file) == []
    killed_at = _last_step(world.root)
    status, said = _train_in_two(world, shard=True)
    assert status == 0, said
    assert said.count("going on from") == said.count("made in") == 1
    student = world.pipeline().make("student_checkpoint/kl")
    assert student.reused
    assert killed_at - 1 <= student.manifest.facts["resumed_from_step"] <= killed_at + 1
    assert student.manifest.facts["processes"] == 2
    one, two = (pq.read_table(made.local_dir() / "curve.parquet")["loss"].to_pylist() for made in (expected, student))
    assert len(one) == 60
    assert two == pytest.approx(one, abs=1e-4)


TOGETHER = "import sys; from distill_pipeline.cli import main; main(sys.argv[1:])"


def _rank_by_rank(world: World, *words: str) -> list[tuple[int, str]]:
    """Exit status and words of ``distill`` in two processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, words[0], str(world.file), *words[1:], "--root", str(world.root)], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in started]
    return [(process.returncode, words) for process, words in zip(started, said, strict=True)]


def test_an_error_of_all_processes_is_one_message_and_nothing_to_do_is_said_once(world: World) -> None:
    for name in ("prompt_pool", "teacher_outputs/small", "scored_outputs/small", "filtered_set/small/every"):
        world.pipeline().make(name)
    world.pipeline().make("student_checkpoint/kl")
    done = _rank_by_rank(world, "train", "kl")
    assert [status for status, _ in done] == [0, 0]
    assert done[0][1].count("nothing to do, its manifest matches") == 1
    assert done[1][1] == ""
    world.document["students"]["kl"]["stages"] = [{"method": "on_policy", "rollouts": {"max_tokens": 300}}]
    world.save()
    failed = _rank_by_rank(world, "train", "kl")
    assert [status for status, _ in failed] == [1, 1]
    assert "".join(said for _, said in failed).count("Error: stages.0.rollouts.max_tokens is 300") == 1


def test_killed_generation_and_killed_training_end_as_if_nothing_had_happened(
    world: World, tmp_path: Path, tiny_teacher_dir: Path
) -> None:
    world.add_prompts(range(100, 400))
    for part in (world.document["teachers"]["small"],):
        part["batch_tokens"] = 1024
    world.document["students"]["kl"]["stages"][0] |= {"epochs": 3, "batch_prompts": 4}
    world.save()
    undisturbed = World(tmp_path / "undisturbed", tiny_teacher_dir)
    undisturbed.add_prompts(range(100, 400))
    undisturbed.document = world.document
    undisturbed.save()
    stages = [name for name in world.pipeline().nodes if not name.endswith(("/strict", "/scratch"))][:5]
    expected = {name: undisturbed.pipeline().make(name) for name in stages}

    world.pipeline().make("prompt_pool")
    killed = _kill_when(world.command("generate", "small"), lambda: any(world.root.glob("generations/**/part-*.parquet")))
    outputs = world.pipeline().make("teacher_outputs/small")
    counts = outputs.manifest.counts
    assert killed
    assert counts["reused"] > 0
    assert counts["reused"] + counts["generated"] == counts["expected"] == 340 * 3
    assert outputs.version == expected["teacher_outputs/small"].version

    for name in stages[2:4]:
        world.pipeline().make(name)
    checkpoints = ".work/student_checkpoint__kl/*/checkpoints/step-*"
    killed = _kill_when(world.command("train", "kl"), lambda: any(world.root.glob(checkpoints)))
    student = world.pipeline().make("student_checkpoint/kl")
    assert killed
    assert student.manifest.facts["resumed_from_step"] > 0
    assert student.manifest.facts["final_loss"] == expected["student_checkpoint/kl"].manifest.facts["final_loss"]
    assert student.version == expected["student_checkpoint/kl"].version


CORRECTION = {"epochs": 4, "lr": 3e-3, "batch_prompts": 8}


def test_a_corrected_teacher_is_the_teacher_of_everything_downstream(world: World, tiny_teacher_dir: Path) -> None:
    from distill_pipeline.models.load import load_model
    from distill_pipeline.training.stage import parameters_sha256

    world.document["students"]["stored"] = world._student("logit_kd", {"prune": {"layers": 2}})
    world.document["students"]["stored"]["stages"][0]["signal"] = "topk"
    world.save()
    before = world.make_all()
    world.document["teachers"]["small"]["correction"] = CORRECTION
    world.save()
    for name in ("teacher_outputs/small", "student_checkpoint/kl"):
        with pytest.raises(MissingInputError, match=r"distill (correct|filter) EXPERIMENT small"):
            open_pipeline(world.file, world.root).make(name)
    after = world.make_all()
    assert all(artifact.reused for artifact in world.make_all().values())
    corrected = after["corrected_teacher/small"]
    teacher = corrected.manifest.facts["teacher"]
    assert (teacher["model"], teacher["license"]) == (str(tiny_teacher_dir), "mit")
    assert corrected.manifest.facts["final_loss"] < corrected.manifest.facts["untrained_loss"]

    old, new = before["teacher_outputs/small"], after["teacher_outputs/small"]
    assert new.manifest.counts["generated"] == new.manifest.counts["expected"] == 120
    assert new.manifest.facts["settings_changed"]["model"] == [teacher["identity"], corrected.version]
    old_rows, new_rows = ({(row["prompt_id"], row["sample_index"]): row for row in outputs.rows()} for outputs in (old, new))
    assert {row["request_key"] for row in old_rows.values()}.isdisjoint(row["request_key"] for row in new_rows.values())
    assert sum(old_rows[key]["raw_text"] != row["raw_text"] for key, row in new_rows.items()) > 60
    answers = new.manifest.facts["teacher"]
    assert (answers["identity"], answers["correction"]["identity"]) == (corrected.version, teacher["identity"])

    assert after["teacher_signals/small/every"].manifest.facts["headers"]["topk"]["teacher"] == corrected.version
    facts = after["student_checkpoint/kl"].manifest.facts
    weights = parameters_sha256(load_model(corrected.local_dir()))
    assert facts["teacher_sha256_before"] == facts["teacher_sha256_after"] == weights
    report = after["eval_report/kl"].read_json("report.json")
    measured = world.pipeline().store.latest("model_evaluation/teacher/small")
    assert measured is not None
    assert measured.manifest.made.inputs["model:teacher"] == corrected.version
    assert report["teachers"][0]["correction"]["final_loss"] == corrected.manifest.facts["final_loss"]
    assert report["cost"]["correction_seconds"] == corrected.manifest.facts["seconds"]
    page = (after["eval_report/kl"].local_dir() / "report.html").read_text()
    assert "<span>teacher</span>small (corrected)</span>" in page
    assert "on 40 references: loss" in page
    leaderboard = after["comparison"].read_json("leaderboard.json")
    assert leaderboard["references"][0]["name"] == "teacher small (corrected)"
    card = Path(after["student_checkpoint/kl"].uri, "README.md").read_text()
    assert f"{tiny_teacher_dir.name} (corrected)" in card.replace("\\", "")


def test_lineage_goes_from_a_student_over_the_answers_to_the_corrected_teacher_and_its_prompts(world: World) -> None:
    world.document["teachers"]["small"] |= {"correction": CORRECTION, "license": "llama3.1", "accept": None}
    world.save()
    names = [
        "student_checkpoint/kl", "filtered_set/small/every", "scored_outputs/small", "teacher_outputs/small",
        "corrected_teacher/small", "prompt_pool",
    ]  # fmt: skip
    made = {name: world.pipeline().make(name) for name in reversed(names)}
    story = trace(open_folder(world.root / "student_checkpoint" / "kl"))
    stories = list(lineage_lines(story))
    lines = [told.splitlines()[0] for told in stories]
    places = [lines.index(f"{name}  {made[name].version}  [verified]") for name in names]
    assert places == sorted(places)
    assert "the student's name begins with Llama" in stories[places[-2]]
    weights = made["corrected_teacher/small"].local_dir() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    difference = trace(open_folder(world.root / "student_checkpoint" / "kl")).first_difference
    assert difference is not None
    assert "corrected_teacher/small" in difference


def test_a_scorer_that_names_a_corrected_teacher_asks_the_corrected_one(world: World) -> None:
    world.document["teachers"]["small"]["correction"] = CORRECTION
    world.document["scorers"]["words"] = [{"kind": "judge", "options": {"model": "small", "max_tokens": 2}}]
    world.save()
    pipeline = world.pipeline()
    for name in ("prompt_pool", "corrected_teacher/small", "teacher_outputs/small", "scored_outputs/small"):
        made = pipeline.make(name)
    corrected = made.manifest.made.inputs["corrected_teacher/small"]
    families = [json.loads(file.read_text()) for file in world.root.glob("generations/*/family.json")]
    assert len(families) == 2, "the answers, and the judge's"
    assert {family["model"] for family in families} == {corrected}


def test_a_killed_correction_ends_with_the_version_of_one_that_was_not(
    world: World, tmp_path: Path, tiny_teacher_dir: Path
) -> None:
    world.document["teachers"]["small"]["correction"] = CORRECTION | {"epochs": 30}
    world.save()
    undisturbed = World(tmp_path / "undisturbed", tiny_teacher_dir)
    undisturbed.document = world.document
    undisturbed.save()
    for each in (world, undisturbed):
        each.pipeline().make("prompt_pool")
    expected = undisturbed.pipeline().make("corrected_teacher/small")
    checkpoints = ".work/corrected_teacher__small/*/checkpoints/step-*"
    killed = _kill_when(world.command("correct", "small"), lambda: any(world.root.glob(checkpoints)))
    corrected = world.pipeline().make("corrected_teacher/small")
    assert killed
    assert corrected.manifest.facts["resumed_from_step"] > 0
    assert corrected.version == expected.version


def test_the_plan_counts_a_correction_and_says_which_answers_it_makes_stale(world: World) -> None:
    from distill_pipeline.planning import plan_experiment

    def notes() -> dict[str, str]:
        return {line.node: line.note for line in plan_experiment(world.pipeline())}

    def make_teacher() -> None:
        for name in ("prompt_pool", "corrected_teacher/small", "teacher_outputs/small"):
            world.pipeline().make(name)

    world.document["teachers"]["small"]["correction"] = CORRECTION
    world.document["students"] = {"kl": world.document["students"]["kl"]}
    world.save()
    line = {line.node: line for line in plan_experiment(world.pipeline())}["corrected_teacher/small"]
    assert (line.rows, line.tokens) == (40 * 4, 40 * 4 * 2), "the reference, one token, and its end"
    assert line.seconds is not None
    make_teacher()
    made = notes()
    assert made["corrected_teacher/small"] == "stored"
    assert "120 of 120 stored" in made["teacher_outputs/small"]
    world.document["teachers"]["small"]["correction"] = CORRECTION | {"lr": 1e-3}
    world.save()
    said = "its correction is not made yet: 0 of 120 stored, 120 made anew"
    assert said in notes()["teacher_outputs/small"]
    world.pipeline().make("corrected_teacher/small")
    assert "other settings than in its last run (model " in notes()["teacher_outputs/small"]
    make_teacher()
    world.add_prompts(range(40, 45))
    world.pipeline().make("prompt_pool")
    assert "its correction is not made yet: 0 of 135 stored" in notes()["teacher_outputs/small"]


def test_of_two_teachers_of_one_model_one_is_corrected_and_the_other_is_not(world: World) -> None:
    world.add_two_teachers(Path(world.document["teachers"]["small"]["model"]))
    world.document["teachers"]["adder"] |= {"correction": CORRECTION, "systems": {"sums": "count"}}
    world.document["students"] = {
        "texts": {"data": ["small/every", "adder/every"], "init": {"prune": {"layers": 2}}, "stages": [{"method": "sft"}]}
    }
    world.document["evaluation"]["domains"] = {"tiny_heldout": "words"}
    world.save()
    made = world.make_all()
    counts = made["corrected_teacher/adder"].manifest.counts
    assert (counts["prompts"], counts["used"], counts["other_domain"]) == (50, 10, 40)
    identities = [made[f"teacher_outputs/{name}"].manifest.facts["teacher"]["identity"] for name in ("small", "adder")]
    assert identities[1] == made["corrected_teacher/adder"].version != identities[0]
    report = made["eval_report/texts"]
    assert "<span>teacher</span>small+adder (corrected)</span>" in (report.local_dir() / "report.html").read_text()


def test_two_processes_correct_a_teacher_like_one(world: World, tmp_path: Path, tiny_teacher_dir: Path) -> None:
    world.document["teachers"]["small"]["correction"] = CORRECTION
    world.save()
    world.pipeline().make("prompt_pool")
    alone = World(tmp_path / "alone", tiny_teacher_dir)
    shutil.copytree(world.root, alone.root)
    alone.document = world.document
    alone.save()
    expected = alone.pipeline().make("corrected_teacher/small")
    together = world.pipeline(launch=Launch(2), student_device="cpu").make("corrected_teacher/small")
    assert together.manifest.facts["processes"] == 2
    one, two = (pq.read_table(made.local_dir() / "curve.parquet")["loss"].to_pylist() for made in (expected, together))
    assert two == pytest.approx(one, abs=1e-4)
