"""Laws of ``accept_target``: asked until enough is accepted, rows from answers and scores alone, nothing paid twice."""

import json
import random
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from distill_pipeline.errors import BudgetError, ConfigError
from distill_pipeline.experiment import parse_experiment
from distill_pipeline.nodes import experiment_nodes
from distill_pipeline.pipeline import Pipeline
from distill_pipeline.storage.artifacts import Artifact, ArtifactStore

N, AT_MOST, WANTED = 2, 9, 2
PRICES = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 2.0}


def document(folder: Path, url: str, **changes: Any) -> dict[str, Any]:
    """24 prompts in two domains, whose right answer is ``yes``; the last one is refused by the server."""
    rows = [{"prompt": f"is {i} prime?", "reference": "yes", "domain": ("odd", "even")[i % 2]} for i in range(23)]
    rows.append({"prompt": "forbidden question", "reference": "yes", "domain": "odd"})
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    budget = {"accept_target": {"accepted": WANTED, "at_most": AT_MOST}} | PRICES | changes.pop("budget", {})
    big = {
        "model": "fake-model", "engine": "openai", "license": "mit", "server": {"base_url": url}, "budget": budget,
        "sampling": {"n": N, "max_tokens": 32},
    }  # fmt: skip
    return {
        "name": "accepting",
        "prompt_pool": {
            "sources": [{"path": str(folder / "prompts.jsonl"), "license": "cc0-1.0"}],
            "holdout_fraction": 0.0, "dedup": {"exact": True}, "decontaminate": {"against": None},
        },
        "teachers": {"big": big | changes},
        "scorers": {"*": [{"kind": "contains_answer"}]},
        "filters": {"verified": {"min_score": 1.0, "drop": ["truncated"]}},
        "students": {"small": {"data": ["big/verified"], "init": {"model": "student"}, "stages": [{"method": "sft"}]}},
        "evaluation": {"tasks": ["no_such_task"]},
    }  # fmt: skip


def script(prompt: str, body: dict[str, Any]) -> dict[str, Any]:
    """Of four answers one is right, and of four one is cut, whatever it says."""
    choices = []
    for index in range(body.get("n", 1)):
        chance = random.Random(f"{prompt}/{body['seed']}/{index}")
        text, reason = chance.choice(["yes", "no", "no", "perhaps"]), chance.choice(["stop", "stop", "stop", "length"])
        choices.append({"index": index, "message": {"content": text}, "finish_reason": reason})
    return {"choices": choices, "usage": {"prompt_tokens": 10, "completion_tokens": 5 * len(choices)}}


class World:
    """One folder of prompts; each store is a machine that has answered nothing yet."""

    def __init__(self, folder: Path, server: Any) -> None:
        self.folder, self.server, self.news = folder, server, list[str]()
        server.script = script

    def pipeline(self, store: str = "store", edit: Callable[[dict[str, Any]], None] | None = None, **changes: Any) -> Pipeline:
        changed = document(self.folder, self.server.url, **changes)
        if edit is not None:
            edit(changed)
        self.news.clear()
        pipeline = Pipeline(
            parse_experiment(changed), ArtifactStore(self.folder / store), teacher_device="cpu", progress=self.news.append
        )
        pipeline.make("prompt_pool")
        return pipeline

    def outputs(self, store: str = "store", **changes: Any) -> Artifact:
        return self.pipeline(store, **changes).make("teacher_outputs/big")

    def asked(self) -> int:
        """Samples that the server was asked for, the refused ones without."""
        bodies = [body for body in self.server.bodies if not body["messages"][-1]["content"].startswith("forbidden")]
        return sum(body.get("n", 1) for body in bodies)


@pytest.fixture
def world(tmp_path: Path, server: Any) -> World:
    return World(tmp_path, server)


def by_prompt(artifact: Artifact) -> dict[str, list[dict[str, Any]]]:
    return {name: list(rows) for name, rows in groupby(artifact.rows(), key=lambda row: row["prompt_id"])}


def is_accepted(row: dict[str, Any]) -> bool:
    return row["finish_reason"] == "stop" and row["answer"] == "yes"


def fixed(changed: dict[str, Any]) -> None:
    """The same experiment without a target, with as many samples as it allows."""
    changed["teachers"]["big"]["sampling"]["n"] = AT_MOST
    del changed["teachers"]["big"]["budget"]["accept_target"]


def test_a_prompt_has_its_first_samples_up_to_the_round_that_had_enough(world: World) -> None:
    artifact = world.outputs()
    lengths = set()
    for rows in by_prompt(artifact).values():
        assert [row["sample_index"] for row in rows] == list(range(len(rows)))
        accepted = [is_accepted(row) for row in rows]
        lengths.add(len(rows))
        if rows[0]["finish_reason"] == "error":
            assert len(rows) == N, "what a whole round was refused for is not asked again"
            continue
        assert len(rows) == AT_MOST or sum(accepted) >= WANTED
        before = (len(rows) - 1) // N * N
        assert sum(accepted[:before]) < WANTED, "the round before was not enough"
    assert {2, AT_MOST} < lengths, "some prompts are easy, some are never solved"


def test_rows_are_conserved_and_the_facts_say_what_was_saved(world: World) -> None:
    artifact = world.outputs()
    counts, facts = artifact.manifest.counts, artifact.manifest.facts["accept_target"]
    groups = by_prompt(artifact)
    num_rows = sum(map(len, groups.values()))
    assert counts["expected"] == num_rows == counts["stopped"] + counts["truncated"] + counts["failed"]
    assert num_rows == counts["reused"] + counts["generated"] + counts["failed"]
    assert counts["failed"] == N
    assert world.asked() == num_rows - N == counts["generated"]
    assert artifact.manifest.facts["asking"]["sent"] == world.server.asked, "of all rounds"
    assert (facts["samples"], facts["samples_of_fixed_n"]) == (num_rows, 24 * AT_MOST)
    assert facts["samples_saved"] == 24 * AT_MOST - num_rows > 0
    reached = sum(sum(map(is_accepted, rows)) >= WANTED for rows in groups.values())
    assert (facts["prompts_reached"], facts["prompts_short"]) == (reached, 24 - reached)
    assert sum(each["reached"] for each in facts["rounds"]) == reached
    assert sum(each["samples"] * each["prompts"] for each in facts["rounds"]) == num_rows
    assert [each["samples"] for each in facts["rounds"]][-1] == AT_MOST % N, "the last round ends at at_most"


def test_later_stages_take_any_number_of_completions_a_prompt_and_score_nothing_again(world: World) -> None:
    pipeline = world.pipeline()
    outputs = pipeline.make("teacher_outputs/big")
    scored = pipeline.make("scored_outputs/big").manifest.counts
    assert (scored["completions"], scored["failed"], scored["scored_anew"]) == (outputs.manifest.counts["expected"], N, 0)
    judged = pipeline.make("filtered_set/big/verified").manifest
    assert judged.counts["completions"] == outputs.manifest.counts["expected"]
    assert judged.counts["accepted"] == sum(is_accepted(row) for row in outputs.rows())
    assert judged.counts["accepted"] + judged.counts["rejected"] + judged.counts["failed"] == judged.counts["completions"]


def test_a_pass_rate_looks_at_the_samples_that_every_prompt_was_asked_for(world: World) -> None:
    pipeline = world.pipeline()
    groups = by_prompt(pipeline.make("teacher_outputs/big"))
    pipeline.make("scored_outputs/big")
    rates = pipeline.make("filtered_set/big/verified").manifest.facts["pass_at"]
    assert set(rates) == {"1", "2"}
    right = [[row["answer"] == "yes" for row in rows[:N]] for rows in groups.values() if rows[0]["finish_reason"] != "error"]
    assert rates["1"]["mean"] == pytest.approx(sum(map(sum, right)) / (N * len(right)), abs=1e-6)


def test_samples_that_are_stored_already_cost_nothing_and_change_no_row(world: World) -> None:
    fresh = world.outputs("fresh")
    world.outputs("store", edit=fixed)
    before = world.asked()
    again = world.outputs("store")
    assert world.asked() == before
    groups = [by_prompt(artifact) for artifact in (fresh, again)]
    assert [len(rows) for rows in groups[0].values()] != [AT_MOST] * 24
    # The answers differ where n differs, since a server draws a request's samples together; the rule is the same.
    for rows in groups[1].values():
        boundary = (len(rows) - 1) // N * N
        assert sum(map(is_accepted, rows[:boundary])) < WANTED
        assert len(rows) in {N, AT_MOST} or sum(map(is_accepted, rows)) >= WANTED


def test_a_raised_ceiling_pays_for_the_difference_and_a_lowered_one_nothing(world: World) -> None:
    first = by_prompt(world.outputs())
    before = world.asked()
    target = {"accepted": WANTED, "at_most": AT_MOST + 4}
    higher = by_prompt(world.outputs(budget={"accept_target": target}))
    short = [name for name, rows in first.items() if len(rows) == AT_MOST and sum(map(is_accepted, rows)) < WANTED]
    assert short
    more = {name: len(rows) - len(first[name]) for name, rows in higher.items() if len(rows) != len(first[name])}
    assert set(more) == set(short)
    assert world.asked() - before == sum(more.values())
    paid = world.asked()
    lower = by_prompt(world.outputs(budget={"accept_target": {"accepted": 1, "at_most": 3}}))
    assert max(map(len, lower.values())) == 3
    assert world.asked() == paid


def test_a_run_that_the_budget_ends_says_so_and_goes_on_to_the_same_rows_at_the_price_of_one_pass(world: World) -> None:
    whole = world.outputs("whole")
    undisturbed = world.asked()
    world.server.bodies.clear()
    with pytest.raises(BudgetError) as caught:
        world.outputs(budget={"max_tokens": 900})
    said = str(caught.value)
    assert said.startswith("the budget is reached: ")
    assert " of max_tokens 900 are used, and the next request could cost more than is left" in said
    assert said.endswith("Everything answered is stored. Raise budget and run again: only the rest is asked.")
    assert 0 < world.asked() < undisturbed
    again = world.outputs(budget={"max_tokens": 90_000})
    assert world.asked() == undisturbed
    assert again.version == whole.version


def test_rows_do_not_depend_on_the_order_in_which_answers_come(world: World, make_server: Callable[..., Any]) -> None:
    whole = world.outputs("whole")
    rough = make_server(fault_frac=0.3, faults=("500", "reset"), seconds=0.001)
    rough.script = script
    place = {"base_url": rough.url, "backoff_seconds": 0.01, "max_attempts": 50, "max_concurrency": 3}
    assert world.outputs("rough", server=place).version == whole.version


def test_a_server_that_takes_one_sample_a_request_is_found_out_once(world: World) -> None:
    whole = world.outputs("whole")
    world.server.takes_n = "no"
    world.server.bodies.clear()
    single = world.outputs("single")
    assert sum(body.get("n", 1) > 1 and "prime" in body["messages"][-1]["content"] for body in world.server.bodies) <= 23
    assert single.manifest.counts["failed"] == whole.manifest.counts["failed"] == N
    assert single.manifest.facts["asking"]["takes_n"] is False


def test_each_round_says_how_many_prompts_lack_how_much(world: World) -> None:
    world.outputs()
    assert world.news[0] != world.news[1]
    assert any(line == "big: 0 of 48 completions are stored, 48 to make" for line in world.news)
    assert any("of 24 prompts have fewer than 2 accepted completions; each is asked for 2 more" in line for line in world.news)


def test_tokens_and_dollars_of_the_domains_make_up_the_teachers(world: World) -> None:
    artifact = world.outputs()
    facts, rows = artifact.manifest.facts, list(artifact.rows())
    domains = facts["domains"]
    assert set(domains) == {"odd", "even"}
    total = {name: sum(domain[name] for domain in domains.values()) for name in domains["odd"]}
    assert (total["prompts"], total["completions"], total["failed"]) == (24, len(rows), N)
    assert total["completion_tokens"] == facts["completion_tokens"] == sum(row["completion_tokens"] for row in rows)
    assert total["prompt_tokens"] == facts["prompt_tokens"] == 23 * 10
    assert total["generated_tokens"] == facts["generated_tokens"] == facts["cost"]["paid_completion_tokens"]
    assert total["usd"] == pytest.approx((total["prompt_tokens"] + 2 * total["completion_tokens"]) / 1e6)
    free = world.outputs("free", budget=dict.fromkeys(PRICES, 0.0))
    assert free.manifest.facts["domains"]["odd"]["usd"] is None


def versions(folder: Path, edit: Callable[[dict[str, Any]], None]) -> dict[str, str]:
    changed = document(folder, "http://a/v1")
    edit(changed)
    return {name: node.code_version for name, node in experiment_nodes(parse_experiment(changed)).items()}


def test_a_target_and_its_scorers_decide_which_rows_there_are_and_prices_do_not(tmp_path: Path) -> None:
    def budget(**fields: Any) -> Callable[[dict[str, Any]], None]:
        return lambda changed: changed["teachers"]["big"]["budget"].update(fields)

    def no_target_and(scorer: str) -> Callable[[dict[str, Any]], None]:
        def edit(changed: dict[str, Any]) -> None:
            fixed(changed)
            changed["scorers"]["*"] = [{"kind": scorer}]

        return edit

    name = "teacher_outputs/big"
    base = versions(tmp_path, lambda changed: None)[name]
    assert versions(tmp_path, budget(max_usd=5.0))[name] == base
    for target in ({"accepted": 1, "at_most": AT_MOST}, {"accepted": WANTED, "at_most": 8}):
        assert versions(tmp_path, budget(accept_target=target))[name] != base
    assert versions(tmp_path, budget(accept_target={"accepted": WANTED, "at_most": AT_MOST, "min_score": 0.5}))[name] != base
    assert versions(tmp_path, lambda changed: changed["scorers"].update({"*": [{"kind": "exact"}]}))[name] != base
    assert versions(tmp_path, no_target_and("exact"))[name] == versions(tmp_path, no_target_and("numeric"))[name]


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda t: t["budget"].update(accept_target={"accepted": 3, "at_most": 2}),
         "teachers.big.budget.accept_target: accepted 3 is more than at_most 2: no prompt could reach it"),
        (lambda t: t["sampling"].update(n=10), "sampling.n 10, a round, is more than budget.accept_target.at_most 9"),
        (lambda t: t["sampling"].update(n=1, temperature=0), "temperature 0 is greedy, so a prompt's samples would be equal"),
        (lambda t: t["budget"].update(accept_target={"accepted": 0, "at_most": 2}), "budget.accept_target.accepted: Input"),
        (lambda t: t["budget"].update(accept_target={"at_most": 2}), "budget.accept_target.accepted: Field required"),
        (lambda t: t["budget"].update(accept_target={"accepted": 1, "at_most": 2, "min_score": 2}), "accept_target.min_score"),
    ],
)  # fmt: skip
def test_targets_that_cannot_be_meant_are_faults(tmp_path: Path, edit: Callable[[Any], None], fault: str) -> None:
    changed = document(tmp_path, "http://a/v1")
    edit(changed["teachers"]["big"])
    with pytest.raises(ConfigError) as caught:
        parse_experiment(changed)
    assert fault in str(caught.value)


def test_a_target_without_scorers_is_a_fault_that_names_the_domain(tmp_path: Path) -> None:
    changed = document(tmp_path, "http://a/v1")
    changed["scorers"] = {}
    with pytest.raises(
        ConfigError, match=r"accept_target: it counts answers that scorers accept, and the experiment has no sco"
    ):
        parse_experiment(changed)
    changed["scorers"] = {"odd": [{"kind": "exact"}]}
    changed["teachers"]["big"]["domains"] = ["odd", "even"]
    with pytest.raises(
        ConfigError, match=r"nothing scores the domain even, so no answer in it is ever accepted; add scorers.even"
    ):
        parse_experiment(changed)


def test_a_domain_that_only_the_rows_name_needs_scorers_before_the_first_request(world: World) -> None:
    def only_odd(changed: dict[str, Any]) -> None:
        changed["scorers"] = {"odd": [{"kind": "exact"}]}

    with pytest.raises(ConfigError, match=r"^teachers.big.budget.accept_target: nothing scores the domain even, so no answer"):
        world.outputs(edit=only_odd)
    assert world.server.asked == 0
