"""The assets ``teacher_signals__<teacher>__<filter>``: what a teacher says of every token of a filtered set, stored sparse."""

import dagster as dg

from assets.checks import check_specs
from assets.making import RunOptions, make_artifact, materialized
from assets.metadata import teacher_signals_metadata
from assets.naming import MODEL_STEP, MODEL_STEP_TAG, asset_options
from distill_pipeline.experiment import Experiment
from distill_pipeline.nodes import Node
from resources.artifact_store import ArtifactStoreResource
from resources.hub import HubResource
from resources.teacher_gpu import TeacherGpuResource


def teacher_signals_asset(experiment: Experiment, node: Node) -> dg.AssetsDefinition:
    """The asset of one teacher's stored distributions over what one filter kept."""
    kinds = " and ".join(node.spec["signals"]["kinds"])
    said = f"The distributions of {experiment.teachers[node.teacher].model}, {kinds}, for students without it in memory."

    @dg.asset(
        **asset_options(node), check_specs=check_specs(node), description=said,
        pool="teacher_gpu", op_tags={MODEL_STEP_TAG: MODEL_STEP},
    )  # fmt: skip
    def teacher_signals(
        context: dg.AssetExecutionContext, config: RunOptions, artifact_store: ArtifactStoreResource, hub: HubResource,
        teacher_gpu: TeacherGpuResource,
    ) -> dg.MaterializeResult:  # fmt: skip
        device = teacher_gpu.device_name()
        artifact = make_artifact(context, experiment, node, config, artifact_store, hub, teacher_device=device)
        return materialized(node, artifact, teacher_signals_metadata(artifact))

    return teacher_signals
