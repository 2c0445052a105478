"""The assets ``student_checkpoint__<student>``: weights as safetensors, tokenizer, manifest and training curve."""

import dagster as dg

from assets.trained_model import trained_model_asset
from distill_pipeline.experiment import Experiment
from distill_pipeline.nodes import Node


def student_checkpoint_asset(experiment: Experiment, node: Node) -> dg.AssetsDefinition:
    """The asset of one trained student."""
    student = experiment.students[node.student]
    said = f"Trained on {', '.join(student.data)} by {', then '.join(stage.method for stage in student.stages)}."
    return trained_model_asset(experiment, node, said)
