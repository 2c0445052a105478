"""``reward_model``: a sequence classifier reads the conversation with the answer in it and gives one number.

Decided: rows are batched by length and padded on the right, so that a score depends neither on padding nor on its batch; a
classifier without a padding token gets batches of equal length. Scores are computed in the dtype in which models run on the
device; the identity of kept scores holds it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from distill_pipeline.errors import ConfigError
from distill_pipeline.models.load import load_classifier, load_tokenizer, resolve_device, resolve_dtype
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.scoring.registry import Scorer, ScoreValue
from distill_pipeline.scoring.rows import AnswerRow, OpenedScorer, ScoringContext, model_of

BATCH_TOKENS = 16_384
"""Most tokens of a batch, padding included."""

_NO_TOKEN = -1
"""Padding token of classifiers that have none: they look for it to find a row's last token, and refuse batches without."""


class RewardModel(OpenedScorer):
    """One output of a transformers sequence classifier for the prompt and the answer, in its chat template.

    Options: ``model`` (a teacher's name or a model reference) and ``revision``; ``scale``: ``sigmoid`` (default) for a logit,
    ``identity`` for a model whose output is in [0, 1] as it is.
    """

    def __init__(self, scorer: Scorer, context: ScoringContext) -> None:
        model = model_of(scorer, context)
        if not isinstance(model, ModelFolder):
            raise ConfigError(f"scorers: reward_model needs a model's weights, and {model.reference} is served. Give a folder.")
        self._folder = model
        self._device = resolve_device(context.device)
        self._dtype = resolve_dtype(self._folder.path, self._device)
        super().__init__(scorer, context, model=self._folder.identity, dtype=self._dtype)
        self._is_sigmoid = scorer.options.get("scale", "sigmoid") == "sigmoid"
        self._classifier: Classifier | None = None

    def score(self, rows: Sequence[AnswerRow]) -> list[ScoreValue]:
        if self._classifier is None:
            self._classifier = Classifier(
                load_classifier(self._folder.path, device=self._device, dtype=self._dtype),
                ChatRenderer(load_tokenizer(self._folder.path)), self._folder.reference,
            )  # fmt: skip
        ids = [self._classifier.ids_of(row) for row in rows]
        fitting = [row_ids for row_ids in ids if not isinstance(row_ids, str)]
        outputs = iter(self._classifier.outputs(fitting))
        return [ScoreValue(None, each) if isinstance(each, str) else self._value(next(outputs)) for each in ids]

    def _value(self, output: float) -> ScoreValue:
        if math.isnan(output):
            return ScoreValue(None, "the reward model's output is not a number", "error")
        if self._is_sigmoid:
            return ScoreValue(float(torch.sigmoid(torch.tensor(output, dtype=torch.float64))), f"output {output:.4g}")
        if not 0.0 <= output <= 1.0:
            raise ConfigError(
                f"scorers: reward_model {self._folder.reference} gave {output:.4g}, which is no score in [0, 1]. "
                "Set its scale to sigmoid."
            )
        return ScoreValue(output, f"output {output:.4g}")


class Classifier:
    """Outputs of a sequence classifier on sequences of ids, in batches of like length."""

    def __init__(self, model: Any, renderer: ChatRenderer, reference: str, *, batch_tokens: int = BATCH_TOKENS) -> None:
        """Raises ConfigError when the model has not exactly one output."""
        if model.config.num_labels != 1:
            raise ConfigError(
                f"scorers: reward_model needs a classifier with one output; {reference} has {model.config.num_labels}."
            )
        self._model, self._renderer, self._batch_tokens = model, renderer, batch_tokens
        config = model.config.get_text_config()
        self._pad_token_id: int | None = config.pad_token_id
        if config.pad_token_id is None:
            config.pad_token_id = _NO_TOKEN
        self._context_tokens: int = getattr(config, "max_position_embeddings", None) or 2**31

    def ids_of(self, row: AnswerRow) -> list[int] | str:
        """The ids of a row's conversation, or why it has none that fit."""
        try:
            ids = self._renderer.conversation_ids([*row.messages, {"role": "assistant", "content": row.answer}])
        except ConfigError as err:
            return str(err)
        if not ids:
            return "the conversation has no token"
        if len(ids) > self._context_tokens:
            return f"{len(ids)} tokens, the reward model's context holds {self._context_tokens}"
        return ids

    def outputs(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The model's output on each sequence, in order."""
        found = [math.nan] * len(sequences)
        for numbers in self._batches(sequences):
            for number, output in zip(numbers, self._run([sequences[number] for number in numbers]), strict=True):
                found[number] = output
        return found

    def _batches(self, sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        batch: list[int] = []
        for number in sorted(range(len(sequences)), key=lambda number: len(sequences[number])):
            length = len(sequences[number])
            is_padded = bool(batch) and length > len(sequences[batch[0]])
            if batch and (length * (len(batch) + 1) > self._batch_tokens or (is_padded and self._pad_token_id is None)):
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    @torch.inference_mode()
    def _run(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        width = max(map(len, sequences))
        rows = [[*ids, *[self._pad_token_id or 0] * (width - len(ids))] for ids in sequences]
        mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences]
        logits = self._model(
            input_ids=torch.tensor(rows, device=self._model.device),
            attention_mask=torch.tensor(mask, device=self._model.device),
        ).logits
        return [float(output) for output in logits[:, 0].float()]
