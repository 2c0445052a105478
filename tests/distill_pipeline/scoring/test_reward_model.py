"""A reward model's scores are those of transformers, whatever the batch and the padding."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill_pipeline.errors import ConfigError, ModelNotFoundError
from distill_pipeline.models.load import load_classifier, load_tokenizer, silent_bars
from distill_pipeline.models.resolve import resolve_model
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.scoring.opening import open_scorer
from distill_pipeline.scoring.reward import Classifier
from distill_pipeline.scoring.rows import AnswerRow, ScoringContext
from distill_pipeline.scoring.spec import ScorerSpec

Samples = Callable[..., list[AnswerRow]]
SaveClassifier = Callable[..., Path]


@pytest.fixture(scope="module", params=["llama", "bert", "no padding token"])
def classifier_dir(request: Any, tmp_path_factory: pytest.TempPathFactory, classifier_of: SaveClassifier) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    if request.param == "no padding token":
        return classifier_of(folder, pad_token_id=None)
    return classifier_of(folder, kind=request.param)


def context_of(folder: Path, tmp_path: Path) -> ScoringContext:
    model = resolve_model(str(folder), models_dir=tmp_path / "models", progress=lambda line: None)
    return ScoringContext(models={(str(folder), None): model}, device="cpu", scores_dir=tmp_path / "scores")


def mixed(samples: Samples) -> list[AnswerRow]:
    texts = ["cold", "what is the opposite of hot? " * 3, "", "seven", "the capital of France is Paris", "a b c d e f g", "no"]
    return [row for number in range(3) for row in samples(texts, "why " * number + "?")]


def test_scores_are_the_sigmoid_of_what_transformers_gives(classifier_dir: Path, samples: Samples, tmp_path: Path) -> None:
    rows = mixed(samples)
    with open_scorer(
        ScorerSpec(kind="reward_model", options={"model": str(classifier_dir)}), context_of(classifier_dir, tmp_path)
    ) as s:
        found = [value.score for value in s.score(rows)]
    from transformers import AutoModelForSequenceClassification

    with silent_bars():
        model = AutoModelForSequenceClassification.from_pretrained(classifier_dir).eval()
    tokenizer = load_tokenizer(classifier_dir)
    for row, score in zip(rows, found, strict=True):
        turns = [*row.messages, {"role": "assistant", "content": row.answer}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            output = float(model(**ids).logits[0, 0])
        assert score == pytest.approx(1 / (1 + math.exp(-output)), abs=1e-5)
    assert len({round(score or 0, 6) for score in found}) > 10


def test_scores_depend_neither_on_the_batch_nor_on_the_order(classifier_dir: Path, samples: Samples) -> None:
    rows = mixed(samples)
    renderer = ChatRenderer(load_tokenizer(classifier_dir))
    found = []
    for batch_tokens in (1, 200, 100_000):
        classifier = Classifier(load_classifier(classifier_dir), renderer, "tiny", batch_tokens=batch_tokens)
        found.append(classifier.outputs([ids for row in rows if not isinstance(ids := classifier.ids_of(row), str)]))
        ids = [classifier.ids_of(row) for row in reversed(rows)]
        found.append(classifier.outputs([each for each in ids if not isinstance(each, str)])[::-1])
    for outputs in found[1:]:
        assert outputs == pytest.approx(found[0], abs=1e-5)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, classifier_of: SaveClassifier) -> Path:
    return classifier_of(tmp_path_factory.mktemp("one"))


def test_a_conversation_that_does_not_fit_is_unknown_and_says_so(one: Path, samples: Samples, tmp_path: Path) -> None:
    with open_scorer(ScorerSpec(kind="reward_model", options={"model": str(one)}), context_of(one, tmp_path)) as scorer:
        values = scorer.score(samples(["x", "y" * 500]))
    assert values[0].score is not None
    assert values[1].score is None
    assert "the reward model's context holds 128" in values[1].detail


def test_identity_refuses_what_is_no_score(one: Path, samples: Samples, tmp_path: Path) -> None:
    spec = ScorerSpec(kind="reward_model", options={"model": str(one), "scale": "identity"})
    with open_scorer(spec, context_of(one, tmp_path)) as scorer, pytest.raises(ConfigError, match="Set its scale to sigmoid"):
        scorer.score(mixed(samples))


def test_models_that_are_no_reward_models_are_refused(
    tmp_path: Path, tiny_model_dir: Path, classifier_of: SaveClassifier, samples: Samples
) -> None:
    two = classifier_of(tmp_path / "two", num_labels=2)
    for folder, reason in ((two, "one output; .* has 2"), (tiny_model_dir, "is no sequence classifier")):
        spec = ScorerSpec(kind="reward_model", options={"model": str(folder)})
        with open_scorer(spec, context_of(folder, tmp_path)) as scorer, pytest.raises(ConfigError, match=reason):
            scorer.score(samples(["x"]))
    with pytest.raises(ModelNotFoundError, match=r"no \.safetensors weights"):
        load_classifier(tmp_path)


def test_the_models_content_and_the_options_name_the_scores(tmp_path: Path, classifier_of: SaveClassifier) -> None:
    folder = tmp_path / "model"
    kept, versions = set(), set()
    for seed, options in ((0, {}), (1, {}), (1, {"scale": "identity"})):
        classifier_of(folder, seed=seed)
        spec = ScorerSpec(kind="reward_model", options={"model": str(folder), **options})
        scorer = open_scorer(spec, context_of(folder, tmp_path))
        assert scorer.kept is not None
        kept.add(scorer.kept.folder)
        versions.add(scorer.version)
    assert len(kept) == len(versions) == 3
