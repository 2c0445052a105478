"""The assets ``corrected_teacher__<teacher>``: a teacher's weights after a short training on gold answers."""

import dagster as dg

from assets.trained_model import trained_model_asset
from distill_pipeline.experiment import Experiment
from distill_pipeline.nodes import Node


def corrected_teacher_asset(experiment: Experiment, node: Node) -> dg.AssetsDefinition:
    """The asset of one corrected teacher."""
    said = f"{experiment.teachers[node.teacher].model}, trained on the references of its prompts before it answers any."
    return trained_model_asset(experiment, node, said)
