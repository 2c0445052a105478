"""Which factory makes the asset of which stage."""

from collections.abc import Callable, Iterable, Mapping

import dagster as dg

from assets.comparison import comparison_asset
from assets.corrected_teacher import corrected_teacher_asset
from assets.eval_report import eval_report_asset
from assets.filtered_set import filtered_set_asset
from assets.prompt_pool import prompt_pool_asset
from assets.scored_outputs import scored_outputs_asset
from assets.student_checkpoint import student_checkpoint_asset
from assets.teacher_outputs import teacher_outputs_asset
from assets.teacher_signals import teacher_signals_asset
from distill_pipeline.experiment import Experiment
from distill_pipeline.nodes import Node, Stage

FACTORIES: Mapping[Stage, Callable[[Experiment, Node], dg.AssetsDefinition]] = {
    "prompt_pool": prompt_pool_asset,
    "corrected_teacher": corrected_teacher_asset,
    "teacher_outputs": teacher_outputs_asset,
    "scored_outputs": scored_outputs_asset,
    "filtered_set": filtered_set_asset,
    "teacher_signals": teacher_signals_asset,
    "student_checkpoint": student_checkpoint_asset,
    "eval_report": eval_report_asset,
    "comparison": comparison_asset,
}


def experiment_assets(experiment: Experiment, nodes: Iterable[Node]) -> list[dg.AssetsDefinition]:
    """One asset a node."""
    return [FACTORIES[node.stage](experiment, node) for node in nodes]
