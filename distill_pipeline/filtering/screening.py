"""A first look at all completions of a chunk at once: which of them a slow rule cannot reject.

The rules in :mod:`distill_pipeline.filtering.rules` decide about one text at a time. Most texts break none, and arrays show
that of a thousand texts in the time that a rule takes for a few. A screen errs to one side only: what it lets through is judged
by the rule itself, so verdicts are the same with and without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill_pipeline.filtering.repetition import may_repeat
from distill_pipeline.filtering.similarity import most_alike
from distill_pipeline.filtering.spec import FilterSpec
from distill_pipeline.ngrams import WordBlock
from distill_pipeline.prompts.contamination import ContaminationIndex


@dataclass(frozen=True, slots=True)
class Screened:
    """What is open about one completion: whether it may be repetitive, may be contaminated, and the most that it can be like
    another of its prompt."""

    may_repeat: bool = True
    may_match: bool = True
    most_alike: float = 1.0


UNSCREENED = Screened()


def screen(
    reasonings: Sequence[str | None],
    answers: Sequence[str],
    prompt_starts: NDArray[np.int64],
    *,
    rule: FilterSpec,
    protected: ContaminationIndex | None,
) -> list[Screened]:
    """A first look at the completions of whole prompts, as far as any rule of the filter asks for it.

    Args:
        reasonings, answers: of each completion.
        prompt_starts: int64 (prompts + 1,); the first completion of each prompt.
    """
    texts: list[str] = []
    text_starts = [0]
    for reasoning, answer in zip(reasonings, answers, strict=True):
        texts += [reasoning, answer] if reasoning else [answer]
        text_starts.append(len(texts))
    starts = np.array(text_starts)
    is_sought = protected is not None and rule.drops("contaminated")
    compares = any(each.diversity is not None or "near_duplicate" in each.drop for each in rule.rules())
    if not (is_sought or compares or rule.drops("repetition")):
        return [UNSCREENED] * len(answers)
    block = WordBlock.of(texts)
    repeats = matches = np.ones(len(texts), dtype=bool)
    alike = np.ones(len(answers))
    if rule.drops("repetition"):
        repeats = may_repeat(texts, block)
    if protected is not None and is_sought:
        matches = protected.may_match(texts, block)
    if compares:
        alike = most_alike(block, block.starts[starts], prompt_starts)
    columns = (np.logical_or.reduceat(repeats, starts[:-1]), np.logical_or.reduceat(matches, starts[:-1]), alike)
    return [Screened(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]
