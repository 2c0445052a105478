"""The assets ``eval_report__<student>``: a student's results beside its teacher's and its untrained self's."""

import dagster as dg

from assets.checks import check_specs
from assets.making import RunOptions, make_artifact, materialized
from assets.metadata import eval_report_metadata
from assets.naming import MODEL_STEP, MODEL_STEP_TAG, asset_options
from distill_pipeline.experiment import Experiment
from distill_pipeline.nodes import Node
from resources.artifact_store import ArtifactStoreResource
from resources.evaluator import EvaluatorResource
from resources.hub import HubResource
from resources.student_gpu import StudentGpuResource


def eval_report_asset(experiment: Experiment, node: Node) -> dg.AssetsDefinition:
    """The asset of one student's evaluation. It takes its place in the students' pool, whose device it uses by default."""
    said = (
        f"{node.student} on {', '.join(experiment.evaluation.tasks)}, beside {' and '.join(experiment.evaluation.baselines)}."
    )

    @dg.asset(
        **asset_options(node), check_specs=check_specs(node), description=said,
        pool="student_gpu", op_tags={MODEL_STEP_TAG: MODEL_STEP},
    )  # fmt: skip
    def eval_report(
        context: dg.AssetExecutionContext, config: RunOptions, artifact_store: ArtifactStoreResource, hub: HubResource,
        student_gpu: StudentGpuResource, evaluator: EvaluatorResource,
    ) -> dg.MaterializeResult:  # fmt: skip
        device = evaluator.device_name(student_gpu)
        artifact = make_artifact(
            context, experiment, node, config, artifact_store, hub, teacher_device=device, student_device=device
        )
        return materialized(node, artifact, eval_report_metadata(artifact))

    return eval_report
