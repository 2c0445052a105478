"""What every asset body does: have the library make an artifact, and report it to Dagster.

The one place that turns an error of the library into a failure of the orchestrator: same text, no retry, because a rerun
without a change meets the same error.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from assets.checks import check_results
from assets.metadata import artifact_metadata, news
from assets.naming import asset_key
from distill_pipeline.errors import DistillError, EmptyResultError
from distill_pipeline.experiment import Experiment
from distill_pipeline.nodes import Node
from resources.artifact_store import ArtifactStoreResource
from resources.hub import HubResource

if TYPE_CHECKING:
    from distill_pipeline.launching import Launch
    from distill_pipeline.storage.artifacts import Artifact


class RunOptions(dg.Config):
    """What a run may decide about a node. Nothing here changes a result."""

    force: bool = Field(default=False, description="Do the work again even where the stored manifest matches.")


def make_artifact(
    context: dg.AssetExecutionContext,
    experiment: Experiment,
    node: Node,
    options: RunOptions,
    store: ArtifactStoreResource,
    hub: HubResource,
    *,
    teacher_device: str = "auto",
    student_device: str = "auto",
    launch: "Launch | None" = None,
) -> "Artifact":
    """Make a node's artifact, a student by ``launch``.

    One that failed its quality gate is returned too: its check says so and stops the run.

    Raises:
        dg.Failure: the library refused; the text is the library's.
    """
    from distill_pipeline.pipeline import Pipeline

    try:
        with hub.environment():
            pipeline = Pipeline(
                experiment, store.open(), teacher_device=teacher_device, student_device=student_device,
                progress=context.log.info, force=options.force, launch=launch,
            )  # fmt: skip
            return pipeline.make(node.name)
    except EmptyResultError as err:
        artifact = store.open().latest(node.name)
        if artifact is None or artifact.manifest.status != "failed" or str(artifact.manifest.reason) not in str(err):
            raise library_failure(err, node) from err
        context.log.error(str(err))
        return artifact
    except DistillError as err:
        raise library_failure(err, node) from err


def library_failure(err: DistillError, node: Node) -> dg.Failure:
    """An error of the library as Dagster's."""
    metadata = {"error": type(err).__name__, "artifact": node.name, "same_step_without_dagster": node.command}
    return dg.Failure(str(err), metadata=metadata, allow_retries=False)


def materialized(node: Node, artifact: "Artifact", metadata: Mapping[str, Any]) -> dg.MaterializeResult:
    """An artifact as a materialisation: its content hash as data version, its metadata, and what its checks found."""
    return dg.MaterializeResult(
        asset_key=asset_key(node.name),
        data_version=dg.DataVersion(artifact.version),
        metadata={"news": news(artifact), **metadata, **artifact_metadata(artifact)},
        check_results=check_results(node, artifact),
    )
