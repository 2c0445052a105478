"""The assets ``corrected_teacher__<teacher>``: a teacher's weights after a short training on gold answers."""

import dagster as dg

from assets.checks import check_specs
from assets.making import RunOptions, make_artifact, materialized
from assets.metadata import trained_model_metadata
from assets.naming import MODEL_STEP, MODEL_STEP_TAG, asset_options
from distill_pipeline.experiment import Experiment
from distill_pipeline.nodes import Node
from resources.artifact_store import ArtifactStoreResource
from resources.hub import HubResource
from resources.student_gpu import StudentGpuResource


def corrected_teacher_asset(experiment: Experiment, node: Node) -> dg.AssetsDefinition:
    """The asset of one corrected teacher. It is trained where students are, and in as many processes."""
    said = f"{experiment.teachers[node.teacher].model}, trained on the references of its prompts before it answers any."

    @dg.asset(
        **asset_options(node), check_specs=check_specs(node), description=said,
        pool="student_gpu", op_tags={MODEL_STEP_TAG: MODEL_STEP},
    )  # fmt: skip
    def corrected_teacher(
        context: dg.AssetExecutionContext, config: RunOptions, artifact_store: ArtifactStoreResource, hub: HubResource,
        student_gpu: StudentGpuResource,
    ) -> dg.MaterializeResult:  # fmt: skip
        artifact = make_artifact(
            context, experiment, node, config, artifact_store, hub, student_device=student_gpu.device_name(),
            launch=student_gpu.launch(),
        )  # fmt: skip
        return materialized(node, artifact, trained_model_metadata(artifact))

    return corrected_teacher
