"""``dagster dev`` as a user meets it: a real server, a real browser, a real sensor."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from assets.naming import asset_key
from assets.sensors import SENSOR_NAME
from distill_pipeline.pipeline import open_pipeline
from scripts.screenshot import CHROMIUM, DagsterDev, chromium_page, dismiss_greeting, lineage_address, open_page

REPOSITORY = Path(__file__).resolve().parents[2]


class Site:
    """``dagster dev`` on a small experiment, with a history, a store and prompt files of its own."""

    def __init__(self, folder: Path, teacher: Path) -> None:
        self.home, self.store, self.prompts = folder / "home", folder / "store", folder / "prompts"
        self.experiment = folder / "experiment.yaml"
        for made in (self.home, self.prompts):
            made.mkdir()
        text = (REPOSITORY / "dagster.yaml").read_text()
        (self.home / "dagster.yaml").write_text(text.replace("./.dagster", str(self.home / "history")))
        document = yaml.safe_load((REPOSITORY / "experiments" / "quickstart.yaml").read_text())
        document["prompt_pool"] = {
            "sources": [{"path": "prompts", "license": "cc0-1.0"}],
            "decontaminate": {"against": None},
            "holdout_fraction": 0.0,
        }
        document["teachers"]["smollm2"] = {"model": str(teacher), "license": "mit", "sampling": {"n": 2, "max_tokens": 4}}
        self.experiment.write_text(yaml.safe_dump(document))
        self.add_prompt("what is one plus one?")
        self.environment = {
            "DAGSTER_HOME": str(self.home), "DISTILL_ROOT": str(self.store), "DISTILL_EXPERIMENT": str(self.experiment),
            "DISTILL_EXECUTOR": "in_process",
        }  # fmt: skip
        self.server = DagsterDev(folder / "log", self.environment)

    def add_prompt(self, text: str) -> None:
        """A prompt file whose writer was done a while ago."""
        path = self.prompts / f"{len(list(self.prompts.iterdir()))}.jsonl"
        path.write_text(json.dumps({"prompt": text, "reference": "x"}) + "\n")
        os.utime(path, (time.time() - 60, time.time() - 60))

    def dagster(self, *words: str) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "dagster", *words]
        environment = {**os.environ, **self.environment}
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"), tiny_teacher_dir)
    with site.server:
        yield site


@pytest.fixture
def page(site: Site) -> Iterator[Any]:
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"no Chromium at {CHROMIUM}: the UI was not looked at")
    pytest.importorskip("playwright", reason="playwright is not installed: the UI was not looked at")
    with chromium_page() as page:
        yield page


def shown(name: str) -> re.Pattern[str]:
    """An asset's name as a node of the graph shows it: long ones have their middle cut out."""
    stage, _, last = name.replace("/", "__").partition("__")
    return re.compile(rf"^{stage[:4]}\S*{last.rpartition('__')[2]}$")


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_a_reports_lineage_shows_the_teacher_and_the_filter_that_made_its_student(site: Site, page: Any) -> None:
    open_page(page, lineage_address(site.server.url, "eval_report__kl"), "prompt_pool")
    dismiss_greeting(page)
    for name in ("teacher_outputs/smollm2", "filtered_set/smollm2/verified", "student_checkpoint/kl", "eval_report/kl"):
        page.get_by_text(shown(name)).first.wait_for(timeout=30_000)
    assert page.get_by_text(shown("student_checkpoint/sft")).count() == 0
    page.screenshot(path=site.home / "lineage.png")

    open_page(page, f"{site.server.url}/assets/student_checkpoint__kl", "Trained on smollm2/verified by logit_kd")
    page.get_by_text("made_without_dagster_by").first.wait_for(timeout=30_000)
    page.screenshot(path=site.home / "asset.png")


@pytest.mark.timeout(300)
def test_a_prompt_file_dropped_while_the_sensor_is_on_starts_a_run_and_only_its_prompt_reaches_the_teacher(site: Site) -> None:
    pipeline = open_pipeline(site.experiment, site.store)
    for name in ("prompt_pool", "teacher_outputs/smollm2"):
        pipeline.make(name)
    with dg.DagsterInstance.from_config(str(site.home)) as instance:
        site.dagster("sensor", "start", SENSOR_NAME, "-w", "workspace.yaml")
        wait_for(lambda: [tick for tick in ticks(instance) if tick.skip_reason], 60)
        assert instance.get_runs_count() == 0, "nothing has changed yet"
        site.add_prompt("what is two plus two?")
        wait_for(lambda: instance.get_latest_materialization_event(asset_key("teacher_outputs/smollm2")), 150)
        assert instance.get_runs_count() == 1
        event = instance.get_latest_materialization_event(asset_key("teacher_outputs/smollm2"))
    assert event is not None
    assert event.asset_materialization is not None
    counts = {name: event.asset_materialization.metadata[f"count_{name}"].value for name in ("prompts", "generated", "reused")}
    assert counts == {"prompts": 2, "generated": 2, "reused": 2}


def ticks(instance: dg.DagsterInstance) -> list[Any]:
    """The sensor's ticks so far."""
    states = [state for state in instance.all_instigator_state() if state.instigator_name == SENSOR_NAME]
    return [tick for state in states for tick in instance.get_ticks(state.instigator_origin_id, state.selector_id)]


def wait_for(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.5)
