"""Laws of the command: it teaches, it makes one node at a time, and an error is one clear line with exit status 1."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from distill_pipeline.cli import main

EXPERIMENT = """\
name: words
prompt_pool:
  sources: [{path: prompts.jsonl, license: cc0-1.0}]
  decontaminate: {against: null}
teachers: {small: {model: no_such_folder, license: mit}}
filters: {every: {}}
students:
  kl: {data: [small/every], init: {prune: {layers: 2}}, stages: [{method: logit_kd}]}
evaluation: {tasks: [some_task]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{"prompt": f"say {n}", "reference": str(n)} for n in range(30)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    (tmp_path / "words.yaml").write_text(EXPERIMENT)
    return tmp_path / "words.yaml"


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_help_names_every_stage_in_order() -> None:
    text = run("--help").output
    places = [
        text.index(f"distill {name}")
        for name in ("plan", "prompts", "correct", "generate", "score", "filter", "signals", "train", "evaluate")
    ]
    assert places == sorted(places)
    for command in main.commands:
        assert run(command, "--help").exit_code == 0


def test_help_says_what_the_environment_decides_and_offers_nothing_in_vain() -> None:
    text = " ".join(run("train", "--help").output.split())
    for variable in ("DISTILL_ROOT", "DISTILL_TRAIN_PROCESSES", "DISTILL_TRAIN_SHARD"):
        assert f"[env var: {variable}" in text
    assert "--force" in text
    assert "--force" not in run("plan", "--help").output, "a plan makes nothing"


def test_a_stage_is_made_once_and_then_says_that_there_is_nothing_to_do(file: Path) -> None:
    first = run("prompts", file, "--root", file.parent / "data")
    assert first.exit_code == 0, first.output
    assert "seen 31, kept 30" in first.output
    assert "malformed 1" in first.output
    again = run("prompts", file, "--root", file.parent / "data")
    assert "nothing to do, its manifest matches" in again.output
    forced = run("prompts", file, "--root", file.parent / "data", "--force")
    assert "nothing to do" not in forced.output


def test_a_missing_input_names_the_command_that_makes_it(file: Path) -> None:
    result = run("generate", file, "small", "--root", file.parent / "data")
    assert result.exit_code == 1
    assert "prompt_pool is not in" in result.output
    assert "Make it first: distill prompts EXPERIMENT" in result.output
    assert "Traceback" not in result.output


def test_an_unknown_node_lists_the_known_ones(file: Path) -> None:
    result = run("train", file, "nobody", "--root", file.parent / "data")
    assert result.exit_code == 1
    assert "words has no student_checkpoint/nobody; it has: prompt_pool, teacher_outputs/small" in result.output


def test_a_missing_model_is_one_clear_error(file: Path) -> None:
    run("prompts", file, "--root", file.parent / "data")
    result = run("generate", file, "small", "--root", file.parent / "data")
    assert result.exit_code == 1
    assert "no_such_folder" in result.output
    assert "Traceback" not in result.output


def test_a_faulty_experiment_shows_all_faults(file: Path) -> None:
    file.write_text(EXPERIMENT.replace("small/every", "other/every").replace("layers: 2", "layers: 0"))
    result = run("prompts", file)
    assert result.exit_code == 1
    assert "2 faults" in result.output
    assert "students.kl.init.prune.layers" in result.output
    assert "unknown teacher 'other'; known: small" in result.output


def test_a_plan_without_a_probe_counts_rows_and_opens_no_model(file: Path) -> None:
    file.write_text(EXPERIMENT.replace("tasks: [some_task]", "tasks: [some_task], include_path: tasks"))
    tasks = file.parent / "tasks"
    tasks.mkdir()
    (tasks / "some_task.yaml").write_text(
        "task: some_task\ndataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{reference}}'\n" % (tasks / "docs.jsonl")
    )
    (tasks / "docs.jsonl").write_text('{"prompt": "held out", "reference": "yes"}\n')
    result = run("plan", file, "--no-probe", "--root", file.parent / "data")
    assert result.exit_code == 0, result.output
    train = int(next(line for line in result.stdout.splitlines() if line.startswith("prompt_pool")).split()[5])
    line = next(line for line in result.output.splitlines() if line.startswith("teacher_outputs/small"))
    assert line.split()[1] == str(4 * train)
    assert not (file.parent / "data" / "prompt_pool").exists()


def test_lineage_of_something_unknown_says_what_to_give(tmp_path: Path) -> None:
    result = run("lineage", "kl", "--root", tmp_path)
    assert result.exit_code == 1
    assert "student_checkpoint/kl is not in" in result.output
    assert run("lineage", tmp_path).exit_code == 1


def test_lineage_finds_a_changed_file_and_exits_with_1(file: Path) -> None:
    root = file.parent / "data"
    run("prompts", file, "--root", root)
    assert run("lineage", "prompt_pool", "--root", root).exit_code == 0
    part = next(root.glob("prompt_pool/*/part-*.parquet"))
    part.write_bytes(part.read_bytes() + b"x")
    result = run("lineage", "prompt_pool", "--root", root)
    assert result.exit_code == 1
    assert "part-00000.parquet differs from its manifest" in result.output
    examined = run("doctor", "--root", root)
    assert examined.exit_code == 1
    assert "part-00000.parquet differs from its manifest" in examined.output


def test_doctor_finds_and_cleans_what_a_crash_left(tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / ".drafts" / "draft-999999-abc").mkdir(parents=True)
    (root / ".work" / "student_checkpoint__kl" / ("0" * 16)).mkdir(parents=True)
    told = run("doctor", "--root", root)
    assert "draft-999999-abc of a process that is gone ; remove it with --clean" in told.output
    assert "student_checkpoint__kl, 0.0 days old, continues when its stage runs again" in told.output
    run("doctor", "--root", root, "--clean")
    assert not list(root.glob(".drafts/*"))
    assert not list(root.glob(".work/*/*"))
