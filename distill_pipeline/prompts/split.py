"""Which prompts are held out: a property of the prompt alone, stable when other prompts come and go."""

from distill_pipeline.hashing import unit_interval
from distill_pipeline.records import Split


def split_of(prompt_id: str, holdout_frac: float) -> Split:
    """``heldout`` for about ``holdout_frac`` of all prompts, ``train`` for the rest; growing the fraction only adds."""
    return "heldout" if unit_interval(f"holdout:{prompt_id}") < holdout_frac else "train"
