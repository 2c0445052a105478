"""What the environment decides before there is a graph: which experiment, and how steps are run."""

import os
from pathlib import Path

import dagster as dg

from assets.naming import MODEL_STEP, MODEL_STEP_TAG
from distill_pipeline.experiment import Experiment, load_experiment

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_EXPERIMENT = "experiments/quickstart.yaml"
EXECUTORS = ("multiprocess", "in_process")


def chosen_experiment() -> Experiment:
    """The experiment that DISTILL_EXPERIMENT names, else the quickstart; a relative path starts at the repository.

    Raises:
        ConfigError: the file is missing or has faults; the message lists all of them.
    """
    return load_experiment(REPOSITORY / Path(os.environ.get("DISTILL_EXPERIMENT") or DEFAULT_EXPERIMENT).expanduser())


def chosen_executor() -> dg.ExecutorDefinition:
    """How the steps of a run are executed.

    By default each step is a process of its own, so that a GPU's memory is free again after each, and one step that loads
    a model runs at a time: two of them on one GPU, or on few cores, only slow each other. DISTILL_MODEL_STEPS allows more
    (a teacher and a student on two GPUs); DISTILL_EXECUTOR=in_process runs everything in one process, without the second
    or two that each process takes to start.

    Raises:
        ValueError: an environment variable holds something else.
    """
    name = os.environ.get("DISTILL_EXECUTOR") or EXECUTORS[0]
    if name not in EXECUTORS:
        raise ValueError(f"DISTILL_EXECUTOR is {name!r}; it must be one of {', '.join(EXECUTORS)}.")
    model_steps = os.environ.get("DISTILL_MODEL_STEPS") or "1"
    if not model_steps.isdigit() or int(model_steps) < 1:
        raise ValueError(f"DISTILL_MODEL_STEPS is {model_steps!r}; it must be a number from 1.")
    if name == "in_process":
        return dg.in_process_executor
    limit = {"key": MODEL_STEP_TAG, "value": MODEL_STEP, "limit": int(model_steps)}
    return dg.multiprocess_executor.configured({"tag_concurrency_limits": [limit]}, name="multiprocess_one_model_at_a_time")
