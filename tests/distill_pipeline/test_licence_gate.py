"""The gate in the pipeline: the licence is found where it stands, and nothing is fetched, loaded or asked before."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from distill_pipeline.errors import LicenseError, ModelNotFoundError
from distill_pipeline.experiment import parse_experiment
from distill_pipeline.pipeline import Pipeline
from distill_pipeline.planning import plan_experiment
from distill_pipeline.storage.artifacts import ArtifactStore

TASKS = str(Path(__file__).parents[2] / "examples/elementary/tasks")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OpenPipeline = Callable[..., Pipeline]


@pytest.fixture
def open_with(tmp_path: Path) -> OpenPipeline:
    def opened(**teacher: Any) -> Pipeline:
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(4)))
        document = {
            "name": "gate",
            "prompt_pool": {
                "sources": [{"path": str(tmp_path / "prompts.jsonl"), "domain": "words", "license": "cc0-1.0"}],
                "holdout_fraction": 0.0, "decontaminate": {"against": None},
            },
            "teachers": {"t": {"sampling": {"n": 1, "temperature": 0, "max_tokens": 2}} | teacher},
            "filters": {"all": {}},
            "students": {"s": {"data": ["t/all"], "init": {"scratch": {"layers": 1}}, "stages": [{"method": "sft"}]}},
            "evaluation": {"tasks": ["elementary_heldout"], "include_path": TASKS},
        }  # fmt: skip
        pipeline = Pipeline(
            parse_experiment(document), ArtifactStore(tmp_path / "store"), teacher_device="cpu", progress=lambda line: None
        )
        pipeline.make("prompt_pool")
        return pipeline

    return opened


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model fails the test."""
    from distill_pipeline.generation import local

    monkeypatch.setattr(local, "load_model", lambda *args, **options: pytest.fail("a model was loaded before the verdict"))


@pytest.fixture
def with_card(tiny_teacher_dir: Path, tmp_path: Path) -> Callable[[str], str]:
    def folder(front_matter: str) -> str:
        copy = tmp_path / "model"
        shutil.copytree(tiny_teacher_dir, copy)
        (copy / "README.md").write_text(f"---\n{front_matter}\n---\n")
        return str(copy)

    return folder


@pytest.mark.parametrize(
    ("front_matter", "license_key", "said"),
    [
        ("license: llama2", None, r"licence llama2 forbids training on its outputs \(1\.b\.v: .*, read 2026-"),
        ("license: other\nlicense_name: mrl", None, r"licence mrl allows only non-commercial use of its outputs"),
        ("license: other", None, r"licence 'other' is not in the table"),
        ("tags: [x]", None, r"no licence is known \(the card README\.md of .*\)"),
        ("license: llama3.1", "apache-2.0", r"the experiment says license apache-2\.0, and the card .* says llama3\.1"),
        ("license: mit", "llama2", r"licence llama2 forbids"),
    ],
)
def test_a_local_models_card_is_read_and_no_model_is_run(
    open_with: OpenPipeline,
    with_card: Callable[[str], str],
    no_model: None,
    front_matter: str,
    license_key: str | None,
    said: str,
) -> None:
    pipeline = open_with(model=with_card(front_matter), license=license_key)
    for ask in (lambda: pipeline.make("teacher_outputs/t"), lambda: plan_experiment(pipeline)):
        with pytest.raises(LicenseError, match=said):
            ask()


def test_a_card_alone_is_enough_and_its_facts_go_with_the_artifact(
    open_with: OpenPipeline, with_card: Callable[[str], str]
) -> None:
    facts = open_with(model=with_card("license: llama3.2")).make("teacher_outputs/t").manifest.facts["teacher"]
    assert (facts["license"], facts["verdict"], facts["name_prefix"]) == ("llama3.2", "obliged", "Llama")
    assert facts["license_from"].startswith("the card README.md of ")


HUB_ERRORS = {"/someone/none": "RepoNotFound", "/someone/gated": "GatedRepo", "/revision/nowhere": "RevisionNotFound"}


class Hub:
    """As much of the Hub as one model's info; counts what it is asked."""

    def __init__(self) -> None:
        self.card: dict[str, Any] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(self.path.partition("?")[0])
                known = None if self.path.startswith("/api/models/someone/tiny") else "EntryNotFound"
                missing = next((code for part, code in HUB_ERRORS.items() if part in self.path), known)
                body = json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": [], "cardData": hub.card}).encode()
                self.send_response(403 if missing == "GatedRepo" else 404 if missing else 200)
                if missing:
                    self.send_header("X-Error-Code", missing)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    found = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"license": "llama3"}, "licence llama3 forbids training on its outputs"),
        ({"license": "other", "license_name": "qwen-research"}, "licence qwen-research allows only non-commercial use"),
        ({}, r"no licence is known \(the Hub's model info of someone/tiny\)"),
        ({"license": ["mit", "cc-by-nc-4.0"]}, "licence 'mit,-cc-by-nc-4.0' is not in the table"),
    ],
)
def test_the_hubs_model_info_is_all_that_is_asked_before_the_verdict(
    open_with: OpenPipeline, hub: Hub, card: dict[str, Any], said: str
) -> None:
    hub.card = card
    with pytest.raises(LicenseError, match=said):
        open_with(model="someone/tiny").make("teacher_outputs/t")
    assert [path for path in hub.asked if "someone/tiny" in path] == ["/api/models/someone/tiny"]


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (
            {"model": "someone/none"},
            r"^model someone/none was found neither as a folder \(.*/someone/none\) nor on the Hub: RepositoryNotFoundError: "
            r".* Check the name and the network, set HF_TOKEN for a private model, or give a local folder, a GGUF file",
        ),
        (
            {"model": "someone/gated", "license": "mit"},
            r"^model someone/gated: its owner asks for an agreement\. Accept it on https://huggingface\.co/someone/gated and "
            r"set HF_TOKEN\.$",
        ),
        (
            {"model": "someone/tiny", "revision": "nowhere"},
            r"^model someone/tiny has no revision nowhere\. Give a commit, branch or tag of it\.$",
        ),
    ],
)
def test_a_model_that_the_hub_does_not_have_is_missing_and_not_a_model_without_a_licence(
    open_with: OpenPipeline, hub: Hub, teacher: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModelNotFoundError, match=said):
        open_with(**teacher).make("teacher_outputs/t")


def test_a_refused_licence_of_the_experiment_asks_nobody(open_with: OpenPipeline, hub: Hub) -> None:
    with pytest.raises(LicenseError, match="licence llama2 forbids"):
        open_with(model="someone/tiny", license="llama2").make("teacher_outputs/t")
    assert hub.asked == []


def test_offline_the_cached_card_counts_and_nobody_is_asked(
    open_with: OpenPipeline, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pipeline = open_with(model="someone/tiny")
    with pytest.raises(LicenseError, match=r"no licence is known \(HF_HUB_OFFLINE is set, and the local Hub cache has no card"):
        pipeline.make("teacher_outputs/t")
    cached = tmp_path / "hub_cache/models--someone--tiny"
    (cached / "snapshots" / COMMIT).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    (cached / "snapshots" / COMMIT / "README.md").write_text("---\nlicense: llama2\n---\n")
    with pytest.raises(LicenseError, match="licence llama2 forbids"):
        pipeline.make("teacher_outputs/t")
    assert hub.asked == []
