"""What the assets of trained weights have in common: students, and corrected teachers."""

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


def trained_model_asset(experiment: Experiment, node: Node, description: str) -> dg.AssetsDefinition:
    """The asset of a node that is trained, on the students' device and in as many processes as they are."""

    @dg.asset(
        **asset_options(node), check_specs=check_specs(node), description=description,
        pool="student_gpu", op_tags={MODEL_STEP_TAG: MODEL_STEP},
    )  # fmt: skip
    def trained_model(
        context: dg.AssetExecutionContext, config: RunOptions, artifact_store: ArtifactStoreResource, hub: HubResource,
        student_gpu: StudentGpuResource,
    ) -> dg.MaterializeResult:  # fmt: skip
        artifact = make_artifact(
            context, experiment, node, config, artifact_store, hub, student_device=student_gpu.device_name(),
            launch=student_gpu.launch(),
        )  # fmt: skip
        return materialized(node, artifact, trained_model_metadata(artifact))

    return trained_model
