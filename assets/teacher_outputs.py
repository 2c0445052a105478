"""The assets ``teacher_outputs__<teacher>``: every completion a teacher gave, with usage and finish reason."""

import dagster as dg

from assets.checks import check_specs
from assets.making import RunOptions, make_artifact, materialized
from assets.metadata import teacher_outputs_metadata
from assets.naming import MODEL_STEP, MODEL_STEP_TAG, asset_options
from distill_pipeline.experiment import Experiment
from distill_pipeline.nodes import Node
from resources.artifact_store import ArtifactStoreResource
from resources.hub import HubResource
from resources.teacher_gpu import TeacherGpuResource


def teacher_outputs_asset(experiment: Experiment, node: Node) -> dg.AssetsDefinition:
    """The asset of one teacher's outputs."""
    teacher = experiment.teachers[node.teacher]
    target, n = teacher.accept_target, teacher.sampling.n
    number = (
        f"{n} completions" if target is None else f"Up to {target.at_most} completions, until {target.accepted} are accepted,"
    )
    said = f"{number} a prompt by {teacher.model} ({teacher.license or 'licence not given'})."

    @dg.asset(
        **asset_options(node), check_specs=check_specs(node), description=said,
        pool="teacher_gpu", op_tags={MODEL_STEP_TAG: MODEL_STEP},
    )  # fmt: skip
    def teacher_outputs(
        context: dg.AssetExecutionContext, config: RunOptions, artifact_store: ArtifactStoreResource, hub: HubResource,
        teacher_gpu: TeacherGpuResource,
    ) -> dg.MaterializeResult:  # fmt: skip
        device = teacher_gpu.device_name()
        artifact = make_artifact(context, experiment, node, config, artifact_store, hub, teacher_device=device)
        return materialized(node, artifact, teacher_outputs_metadata(artifact))

    return teacher_outputs
