"""The asset ``comparison``: all students of the experiment side by side."""

import dagster as dg

from assets.checks import check_specs
from assets.making import RunOptions, make_artifact, materialized
from assets.metadata import comparison_metadata
from assets.naming import asset_options
from distill_pipeline.experiment import Experiment
from distill_pipeline.nodes import Node
from resources.artifact_store import ArtifactStoreResource
from resources.hub import HubResource


def comparison_asset(experiment: Experiment, node: Node) -> dg.AssetsDefinition:
    """The asset of the leaderboard."""
    said = f"Leaderboard of {', '.join(experiment.students)}."

    @dg.asset(**asset_options(node), check_specs=check_specs(node), description=said)
    def comparison(
        context: dg.AssetExecutionContext, config: RunOptions, artifact_store: ArtifactStoreResource, hub: HubResource
    ) -> dg.MaterializeResult:
        artifact = make_artifact(context, experiment, node, config, artifact_store, hub)
        return materialized(node, artifact, comparison_metadata(artifact))

    return comparison
