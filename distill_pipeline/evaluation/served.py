"""A teacher that is only an API, under evaluation: asked once for each question, through the generation store.

Decided: only tasks in which a model writes a greedy answer are asked; an API gives no likelihood of a text that it did not
write. Of an answer with a chain of thought the part after it counts. What an API refuses (a question that does not fit its
context) counts as unanswered; what it failed to answer ends the evaluation, and asking goes on where it was.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM

from distill_pipeline.errors import GenerationError
from distill_pipeline.evaluation.language_model import GeneratedText, RenderedPrompt, cut_answer, generation_settings
from distill_pipeline.evaluation.stage import evaluate_subject
from distill_pipeline.evaluation.tasks import load_tasks
from distill_pipeline.generation.asking import Answer, GreedyAnswers
from distill_pipeline.outcome import Progress
from distill_pipeline.reasoning import split_reasoning
from distill_pipeline.system_prompts import with_system

REFUSED = ("prompt_too_long", "rejected", "content_filter")
"""Errors that asking again would not mend."""

Messages = Sequence[Mapping[str, str]]


def unanswerable_tasks(tasks: Sequence[str], include_path: str | None) -> str | None:
    """Which of the tasks an API cannot be measured on, with the reason; None where it can be on all.

    Raises:
        ConfigError: a task is unknown, or asks for a generation setting that is not supported.
    """
    faults = []
    for name, task in load_tasks(tasks, include_path)["tasks"].items():
        kwargs = getattr(task.config, "generation_kwargs", None) or {}
        if task.OUTPUT_TYPE != "generate_until":
            faults.append(f"{name} needs the likelihood of given texts")
        elif getattr(task.config, "gen_prefix", None):
            faults.append(f"{name} dictates how an answer begins")
        elif generation_settings(kwargs, name).get("temperature"):
            faults.append(f"{name} samples its answers")
    return "; ".join(faults) or None


def evaluate_served(
    answers: Callable[[int], GreedyAnswers], *, name: str, tasks: Sequence[str], include_path: str | None, system: str | None,
    limit: int | None, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Answers and metrics of a teacher that is only an API, as :func:`~distill_pipeline.evaluation.stage.evaluate_model` gives.

    Args:
        answers: from the most tokens of an answer to who gives and keeps them.
        name: what messages call the teacher.
        tasks: such that :func:`unanswerable_tasks` finds no fault.
        system: the teacher's system prompt.
    Raises:
        GenerationError: the API did not answer all questions; what it did answer is stored.
    """
    subject = ServedSubject(answers, name=name, system=system, progress=progress)
    return evaluate_subject(
        subject, tasks=tasks, include_path=include_path, limit=limit, has_template=True, renderer="the server's"
    )


class ServedSubject(LM):  # type: ignore[misc]
    """A model behind an API for :func:`lm_eval.simple_evaluate`."""

    def __init__(self, answers: Callable[[int], GreedyAnswers], *, name: str, system: str | None, progress: Progress) -> None:
        super().__init__()
        self._answers, self._name, self._system, self._progress = answers, name, system, progress

    @property
    def tokenizer_name(self) -> str:
        """lm-eval's name for how prompts look: the server renders them."""
        return "the server's"

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> RenderedPrompt:
        """A conversation as a prompt, with the teacher's system prompt; its text is for logs."""
        assert add_generation_prompt, "such tasks are not asked"
        messages = [dict(message) for message in with_system(chat_history, self._system)]
        prompt = RenderedPrompt("\n\n".join(message["content"] for message in messages))
        prompt.messages, prompt.prefix = tuple(messages), ""
        return prompt

    def generate_until(self, requests: Sequence[Any]) -> list[GeneratedText]:
        """One greedy answer a request. Raises GenerationError."""
        found: dict[int, GeneratedText] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for indices in groups.values():
            settings = generation_settings(requests[indices[0]].args[1], requests[indices[0]].task_name)
            self._progress(f"{self._name}: {len(indices)} evaluation questions, asked of its server where not stored")
            asked = self._answers(settings["max_tokens"]).answer([requests[index].args[0].messages for index in indices])
            self._check(asked)
            found |= {i: _text(answer, settings["until"]) for i, answer in zip(indices, asked, strict=True)}
        return [found[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not for an API: such tasks are not asked."""
        raise NotImplementedError(f"{self._name} is only an API: it gives no likelihood of a text")

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Not for an API: such tasks are not asked."""
        raise NotImplementedError(f"{self._name} is only an API: it gives no likelihood of a text")

    def _check(self, answers: Sequence[Answer]) -> None:
        errors = [answer["error"] for answer in answers if answer.get("error")]
        if failed := [error for error in errors if error.partition(":")[0] not in REFUSED]:
            raise GenerationError(
                f"teacher {self._name} did not answer {len(failed)} of {len(answers)} evaluation questions, the first with "
                f"{failed[0]}. The other answers are stored: run again."
            )


def _text(answer: Answer, until: Sequence[str]) -> GeneratedText:
    text = cut_answer(split_reasoning(answer["raw_text"])[1], until, answer["finish_reason"])
    text.raw_text = answer["raw_text"]
    return text
