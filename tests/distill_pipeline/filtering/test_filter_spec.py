"""Laws of a filter's settings: the nearer setting counts, what is meant is written out, and faults are named."""

import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from distill_pipeline.errors import ConfigError
from distill_pipeline.experiment import parse_experiment
from distill_pipeline.filtering.spec import PRESETS, FilterSpec


def spec(**fields: Any) -> FilterSpec:
    return FilterSpec.model_validate(fields)


def test_nothing_asked_for_drops_nothing() -> None:
    rule = spec().of("any")
    assert (rule.drop, rule.keep, rule.most_per_prompt, rule.min_score) == ((), "all", None, None)


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_go_before_their_preset(preset: str) -> None:
    rule = spec(preset=preset, drop=["empty"], repetition={"answer": "off"}).of("any")
    assert rule.drop == ("empty",)
    assert rule.repetition.answer == "off"
    assert spec(preset=preset).of("any").drop == PRESETS[preset]["drop"]  # type: ignore[index]


def test_a_domain_goes_before_the_filter_and_keeps_what_it_does_not_name() -> None:
    found = spec(
        preset="chat",
        min_score=0.5,
        drop=["refusal"],
        domains={"code": {"preset": "code", "keep": 2}, "x": {"min_score": None}},
    )
    assert found.of("poetry") == found.of("*")
    assert found.of("code").drop == PRESETS["code"]["drop"]
    assert (found.of("code").min_score, found.of("code").keep, found.of("poetry").keep) == (0.5, 2, "all")
    assert (found.of("x").min_score, found.of("x").drop) == (None, ("refusal",))
    assert found.drops("contaminated")
    assert not spec(domains={"x": {"drop": ["refusal"]}}).drops("contaminated")


def test_gopher_is_asked_of_no_program_and_no_derivation() -> None:
    assert {name: preset["repetition"].answer for name, preset in PRESETS.items()} == {
        "math": "loops", "code": "loops", "chat": "gopher", "short_answer": "loops",
    }  # fmt: skip


def test_a_setting_turns_its_rule_on_and_null_turns_it_off() -> None:
    found = spec(
        preset="chat", language="en", domains={"code": {"preset": "code"}, "x": {"language": None, "near_duplicate": None}}
    )
    assert "language" in found.of("code").drop
    assert found.of("code").language == ("en",)
    assert not {"language", "near_duplicate"} & set(found.of("x").drop)
    assert spec(near_duplicate={"threshold": 0.7}).of("d").drop == ("near_duplicate",)
    assert spec(drop=["near_duplicate"]).of("d").near_duplicate is not None


def test_what_is_meant_is_written_out_and_two_ways_to_say_it_are_one() -> None:
    short = spec(preset="short_answer").expanded()
    assert short == {"*": spec(**short["*"]).of("*").document()}
    assert "preset" not in short["*"]
    assert spec(language=["en"]).expanded() == spec(language="en", drop=["language"]).expanded()
    assert sorted(spec(domains={"b": {}, "a": {}}).expanded()) == ["*", "a", "b"]


def test_limits_on_a_prompts_completions_are_known_before_it_is_judged() -> None:
    most = [spec(**fields).of("d").most_per_prompt for fields in (
        {}, {"max_per_prompt": 3}, {"keep": "best_of_n"}, {"keep": "shortest", "max_per_prompt": 2}, {"keep": 4},
        {"keep": 4, "max_per_prompt": 2},
    )]  # fmt: skip
    assert most == [None, 3, 1, 2, 4, 2]


def test_the_tokenizers_of_all_domains_are_known() -> None:
    found = spec(length={"min_tokens": 1}, domains={"x": {"length": {"max_tokens": 5, "tokenizer": "some/model"}}})
    assert found.tokenizers() == ("some/model",)


def test_a_filter_travels_to_another_process() -> None:
    found = spec(preset="math", domains={"x": {"keep": 2}})
    assert pickle.loads(pickle.dumps(found)).expanded() == found.expanded()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"keep": True}, "'all', 'best_of_n', 'shortest' or the number of completions to keep"),
        ({"keep": 0}, "1 or more"),
        ({"language": "xx"}, "unknown language xx; known: ace af"),
        ({"language": []}, "for instance en or"),
        ({"drop": ["language"]}, "say which ones may stay, for instance language: en"),
        ({"domains": {"x": {"drop": ["language"]}}}, "in domain x"),
        ({"length": {}}, "give min_tokens, max_tokens or both"),
        ({"length": {"min_tokens": 5, "max_tokens": 4}}, "min_tokens 5 is more than max_tokens 4"),
        ({"difficulty": {"min": 0.9, "max": 0.1}}, "min 0.9 is more than max 0.1"),
        ({"diversity": {"max_similarity": 1.0}}, "less than 1"),
        ({"preset": "poetry"}, "'math', 'code', 'chat' or 'short_answer'"),
        ({"domains": {"x": {"domains": {}}}}, "Extra inputs are not permitted"),
    ],
)
def test_faults_say_what_is_allowed(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(**fields)
    assert said in str(caught.value)


def test_all_faults_of_an_experiments_filters_are_reported_at_once() -> None:
    document = {
        "name": "e", "prompt_pool": {"sources": [{"path": "p.jsonl", "license": "mit"}]},
        "teachers": {"t": {"model": "m", "license": "mit"}}, "evaluation": {"tasks": ["x"]},
        "students": {"s": {"data": ["t/f"], "init": {"model": "m"}, "stages": [{"method": "sft"}]}},
        "filters": {
            "f": {"keep": "best", "domains": {"code": {"presets": "code", "language": "xx"}}}, "g": {"drop": ["language"]},
        },
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        parse_experiment(document)
    for said in ("filters.f.keep: ", "filters.f.domains.code.presets: unknown field; known: difficulty, diversity, drop",
                 "filters.f.domains.code.language: unknown language xx", "filters.g: drop names language"):  # fmt: skip
        assert said in str(caught.value)
    assert "experiment has 4 faults" in str(caught.value)
