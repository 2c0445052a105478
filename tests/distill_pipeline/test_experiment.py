"""Laws of the experiment file: all faults at once, each with its path and what is allowed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipeline.errors import ConfigError
from distill_pipeline.experiment import load_experiment, parse_experiment

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def document() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "experiments/quickstart.yaml").read_text())


def faults_of(document: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(document)
    return str(caught.value)


def test_the_shipped_experiments_are_valid() -> None:
    files = sorted((REPOSITORY / "experiments").glob("*.yaml"))
    assert files
    for file in files:
        assert load_experiment(file).name == file.stem


def test_every_fault_is_reported_at_once_with_its_path(document: dict[str, Any]) -> None:
    document["teachers"]["smollm2"]["sampling"]["temperature"] = -1
    document["filters"]["verified"]["min_score"] = 7
    document["filters"]["verified"]["drop"] = ["shouting"]
    document["students"]["kl"]["data"] = ["nobody/verified", "smollm2/nothing"]
    document["students"]["sft"]["init"] = {}
    document["scorers"]["elementary"] = [{"kind": "contains_anser"}]
    document["prompt_pool"]["hold_out"] = 0.1
    del document["evaluation"]["tasks"]
    text = faults_of(document)
    for expected in [
        "teachers.smollm2.sampling.temperature: Input should be greater than or equal to 0 (given: -1)",
        "filters.verified.min_score: Input should be less than or equal to 1 (given: 7)",
        "filters.verified.drop.0: Input should be 'truncated', 'refusal'",
        "students.kl.data.0: unknown teacher 'nobody'; known: smollm2",
        "students.kl.data.1: unknown filter 'nothing'; known: unfiltered, verified",
        "students.sft.init: give exactly one of prune, scratch, model (given: none)",
        "scorers.elementary.0.kind: ",
        "prompt_pool.hold_out: unknown field; known: decontaminate, dedup, holdout_fraction, sources",
        "evaluation.tasks: Field required",
    ]:
        assert expected in text
    assert "experiment has 9 faults:" in text


def test_a_temperature_without_stored_signals_is_a_fault_of_the_file(document: dict[str, Any]) -> None:
    document["students"]["kl"]["stages"][0] |= {"signal": "topk", "kd_temperature": 2.0}
    document["students"]["sft"]["stages"][0] |= {"signal": "sampled"}
    text = faults_of(document)
    assert "students.kl.stages.0.kd_temperature: 2.0 is not among signals.temperatures (1.0); add it there" in text
    assert "students.sft.stages.0: signal sampled is for method logit_kd with divergence forward_kl" in text
    document["signals"] = {"temperatures": [1.0, 1.0], "k": 0, "draws": 256}
    text = faults_of(document)
    for part in ("signals.temperatures: a temperature is listed twice", "signals.k: ", "signals.draws: "):
        assert part in text


def test_a_correction_without_weights_here_or_of_a_revision_is_a_fault_that_says_why(document: dict[str, Any]) -> None:
    served = {"model": "big", "engine": "openai", "server": {"base_url": "http://x/v1"}, "correction": {}}
    document["teachers"] |= {"served": served, "coded": {"model": "m", "trust_remote_code": True, "correction": {}}}
    document["teachers"]["smollm2"]["correction"] = {"lr": 0, "decay_frac": 0.5}
    document["scorers"]["elementary"] = [{"kind": "judge", "options": {"model": "smollm2", "revision": "main"}}]
    text = faults_of(document)
    assert "teachers.served: correction is for a model that runs here; with engine openai the server would have to" in text
    assert "teachers.coded: correction trains and saves a model without code of its own; leave it or trust_remote_code" in text
    assert "teachers.smollm2.correction.lr: Input should be greater than 0" in text
    assert "scorers.elementary.0.options.revision: teacher smollm2 is corrected, and its corrected weights have no" in text
    document["teachers"]["smollm2"]["correction"] = {"decay_frac": 0.5, "schedule": "linear"}
    assert "teachers.smollm2.correction: decay_frac: not read by schedule linear" in faults_of(document)


def test_a_corrected_teacher_is_another_model_than_the_same_one_as_it_is(document: dict[str, Any]) -> None:
    document["teachers"]["twin"] = document["teachers"]["smollm2"] | {"accept": None}
    document["students"]["kl"]["data"] = ["smollm2/verified", "twin/verified"]
    parse_experiment(document)
    for name in ("twin", "smollm2"):  # of two that are corrected each learns its own references
        document["teachers"][name]["correction"] = {}
        assert "the rows are of several models (smollm2, twin)" in faults_of(document)


def test_an_unknown_scorer_lists_the_known_ones(document: dict[str, Any]) -> None:
    document["scorers"]["elementary"] = [{"kind": "contains_anser"}]
    assert "contains_answer" in faults_of(document)


@pytest.mark.parametrize("name", ["../up", "a/b", "with space", "Upper", "a__b", "", "-x", "x" * 64])
@pytest.mark.parametrize("part", ["teachers", "filters", "students"])
def test_names_that_could_leave_the_store_are_refused(document: dict[str, Any], part: str, name: str) -> None:
    value = copy.deepcopy(next(iter(document[part].values())))
    document[part][name] = value
    assert f"{part}." in faults_of(document)


def test_greedy_sampling_with_several_samples_is_refused(document: dict[str, Any]) -> None:
    document["teachers"]["smollm2"]["sampling"] = {"n": 4, "temperature": 0}
    assert "temperature 0 is greedy, 4 samples would be equal; set n: 1" in faults_of(document)


def test_an_unknown_baseline_lists_the_known_ones(document: dict[str, Any]) -> None:
    document["evaluation"]["baselines"] = ["teacher", "scratch", "gold"]
    assert "evaluation.baselines.2: unknown baseline 'gold'; known: teacher, untrained, kl, scratch, sft" in faults_of(document)


def test_a_domain_of_a_filter_that_no_prompt_is_in_is_named_beside_the_known_ones(document: dict[str, Any]) -> None:
    document["filters"]["verified"]["domains"] = {"maths": {"preset": "math"}, "math": {"min_score": 1.0}, "*": {}}
    experiment = parse_experiment(document)
    with pytest.raises(ConfigError) as caught:
        experiment.require_domains(["math", "code"])
    assert str(caught.value) == (
        "filters.verified.domains.maths: no prompt is in this domain. The prompts are in: code, elementary, math. "
        "Mend the name, or take it out."
    )
    experiment.require_domains(["maths", "math"])


def test_relative_paths_start_above_the_experiments_folder(tmp_path: Path, document: dict[str, Any]) -> None:
    inside, outside = tmp_path / "experiments" / "x.yaml", tmp_path / "x.yaml"
    inside.parent.mkdir()
    for file in (inside, outside):
        file.write_text(yaml.safe_dump(document))
        assert load_experiment(file).resolve_path("data/p.jsonl") == str(tmp_path / "data/p.jsonl")
    assert load_experiment(inside).resolve_path("s3://bucket/p.jsonl") == "s3://bucket/p.jsonl"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "must be a mapping, it is a NoneType"), (b"- 1", "it is a list"), (b"a: [", "not valid YAML"),
     (b"\xff\xfe", "not valid YAML"), (b"x: !!python/object/apply:os.system ['true']", "not valid YAML")],
)  # fmt: skip
def test_a_file_that_is_no_yaml_mapping_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_experiment(file)


def test_a_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the experiment file .*No such file"):
        load_experiment(tmp_path / "none.yaml")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["name", "seed", "prompt_pool", "teachers", "scorers", "filters", "signals", "students", "evaluation", "x"]
        ),
        JSON,
    )
)
def test_any_document_is_a_config_error_and_never_another(document: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_experiment(document)
