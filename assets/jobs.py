"""The jobs that automation starts. By hand, any selection of assets can be materialised without one."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from assets.naming import asset_key
from distill_pipeline.nodes import Node, Stage

PROMPTS_TO_COMPARISON = "prompts_to_comparison"
REEVALUATION = "reevaluation"
REMEASURED: tuple[Stage, ...] = ("eval_report", "comparison")


def experiment_jobs(nodes: Mapping[str, Node]) -> list[Any]:
    """Both jobs of an experiment (Dagster gives the class of an asset job no public name)."""
    measured = [asset_key(name) for name, node in nodes.items() if node.stage in REMEASURED]
    forced = {"ops": {key.to_python_identifier(): {"config": {"force": True}} for key in measured}}
    return [
        dg.define_asset_job(
            PROMPTS_TO_COMPARISON,
            selection=dg.AssetSelection.assets(asset_key("prompt_pool")).downstream(),
            description="Prompt pool to comparison. A stage whose inputs did not change does nothing and says so.",
        ),
        dg.define_asset_job(
            REEVALUATION,
            selection=dg.AssetSelection.assets(*measured),
            config=forced,
            description="Measures every student again, whatever the manifests say.",
        ),
    ]
