"""The assets ``filtered_set__<teacher>__<filter>``: every completion with its verdict; the accepted ones train students."""

import dagster as dg

from assets.checks import check_specs
from assets.making import RunOptions, make_artifact, materialized
from assets.metadata import filtered_set_metadata
from assets.naming import asset_options
from distill_pipeline.experiment import Experiment
from distill_pipeline.nodes import Node
from resources.artifact_store import ArtifactStoreResource
from resources.hub import HubResource


def filtered_set_asset(experiment: Experiment, node: Node) -> dg.AssetsDefinition:
    """The asset of what one filter makes of one teacher's outputs."""
    rule = experiment.filters[node.filter].model_dump(mode="json", exclude_defaults=True)
    said = ", ".join(f"{field} {value}" for field, value in rule.items()) or "everything that is no failure"

    @dg.asset(**asset_options(node), check_specs=check_specs(node), description=f"Keeps: {said}.")
    def filtered_set(
        context: dg.AssetExecutionContext, config: RunOptions, artifact_store: ArtifactStoreResource, hub: HubResource
    ) -> dg.MaterializeResult:
        artifact = make_artifact(context, experiment, node, config, artifact_store, hub)
        return materialized(node, artifact, filtered_set_metadata(artifact))

    return filtered_set
