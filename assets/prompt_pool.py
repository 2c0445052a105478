"""The asset ``prompt_pool``: normalised, deduplicated, decontaminated prompts of all sources."""

import dagster as dg

from assets.checks import check_specs
from assets.making import RunOptions, make_artifact, materialized
from assets.metadata import prompt_pool_metadata
from assets.naming import asset_options
from distill_pipeline.experiment import Experiment
from distill_pipeline.nodes import Node
from resources.artifact_store import ArtifactStoreResource
from resources.hub import HubResource


def prompt_pool_asset(experiment: Experiment, node: Node) -> dg.AssetsDefinition:
    """The asset of the experiment's prompt pool."""
    sources = ", ".join(source.path for source in experiment.prompt_pool.sources)

    @dg.asset(**asset_options(node), check_specs=check_specs(node), description=f"Prompts from {sources}.")
    def prompt_pool(
        context: dg.AssetExecutionContext, config: RunOptions, artifact_store: ArtifactStoreResource, hub: HubResource
    ) -> dg.MaterializeResult:
        artifact = make_artifact(context, experiment, node, config, artifact_store, hub)
        return materialized(node, artifact, prompt_pool_metadata(artifact))

    return prompt_pool
