"""Everything Dagster knows of the experiment. ``dagster dev`` and ``dagster ... -m assets.definitions`` load it."""

import dagster as dg

from assets.jobs import experiment_jobs
from assets.loading import chosen_executor, chosen_experiment
from assets.schedules import weekly_reevaluation
from assets.sensors import new_prompt_files_sensor
from assets.stages import experiment_assets
from distill_pipeline.experiment import Experiment
from distill_pipeline.nodes import experiment_nodes
from resources.artifact_store import ArtifactStoreResource
from resources.evaluator import EvaluatorResource
from resources.hub import HubResource
from resources.student_gpu import StudentGpuResource
from resources.teacher_gpu import TeacherGpuResource


def build_definitions(experiment: Experiment) -> dg.Definitions:
    """The definitions of one experiment."""
    nodes = experiment_nodes(experiment)
    return dg.Definitions(
        assets=experiment_assets(experiment, nodes.values()),
        jobs=experiment_jobs(nodes),
        sensors=[new_prompt_files_sensor(experiment)],
        schedules=[weekly_reevaluation()],
        resources={
            "artifact_store": ArtifactStoreResource(),
            "teacher_gpu": TeacherGpuResource(),
            "student_gpu": StudentGpuResource(),
            "evaluator": EvaluatorResource(),
            "hub": HubResource(),
        },
        executor=chosen_executor(),
    )


defs = build_definitions(chosen_experiment())
