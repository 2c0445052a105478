"""The assets ``scored_outputs__<teacher>``: one score a completion and scorer; a scorer may say that it cannot tell."""

import dagster as dg

from assets.checks import check_specs
from assets.making import RunOptions, make_artifact, materialized
from assets.metadata import scored_outputs_metadata
from assets.naming import MODEL_STEP, MODEL_STEP_TAG, asset_options
from distill_pipeline.experiment import Experiment
from distill_pipeline.nodes import Node
from distill_pipeline.scoring.registry import scorer_models
from resources.artifact_store import ArtifactStoreResource
from resources.hub import HubResource
from resources.teacher_gpu import TeacherGpuResource


def scored_outputs_asset(experiment: Experiment, node: Node) -> dg.AssetsDefinition:
    """The asset of one teacher's scores."""
    kinds = "; ".join(f"{domain}: {', '.join(scorer.kind for scorer in used)}" for domain, used in experiment.scorers.items())

    asks_models = bool(scorer_models(experiment.scorers))

    @dg.asset(
        **asset_options(node), check_specs=check_specs(node), description=f"Scores by domain. {kinds or 'No scorers'}.",
        pool="teacher_gpu" if asks_models else None, op_tags={MODEL_STEP_TAG: MODEL_STEP} if asks_models else None,
    )  # fmt: skip
    def scored_outputs(
        context: dg.AssetExecutionContext, config: RunOptions, artifact_store: ArtifactStoreResource, hub: HubResource,
        teacher_gpu: TeacherGpuResource,
    ) -> dg.MaterializeResult:  # fmt: skip
        device = teacher_gpu.device_name()
        artifact = make_artifact(context, experiment, node, config, artifact_store, hub, teacher_device=device)
        return materialized(node, artifact, scored_outputs_metadata(artifact))

    return scored_outputs
