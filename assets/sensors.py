"""What happens when something arrives.

Off until switched on: a run costs teacher tokens and training hours, and starting ``dagster dev`` to look at a graph must
not begin to spend them. Switch it on in the UI (Automation) or with ``dagster sensor start new_prompt_files``.
"""

import time
from collections.abc import Mapping

import dagster as dg

from assets.jobs import PROMPTS_TO_COMPARISON
from assets.prompt_files import Seen, UnsettledError, look_at_sources
from distill_pipeline.errors import DistillError
from distill_pipeline.experiment import Experiment
from resources.artifact_store import ArtifactStoreResource

UNFINISHED = [
    dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]  # fmt: skip
SENSOR_NAME = "new_prompt_files"


def new_prompt_files_sensor(experiment: Experiment) -> dg.SensorDefinition:
    """Starts the job once for each change of the prompt files' content."""

    @dg.sensor(
        name=SENSOR_NAME,
        job_name=PROMPTS_TO_COMPARISON,
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Starts a run when the content of the experiment's prompt files changed.",
    )
    def new_prompt_files(context: dg.SensorEvaluationContext, artifact_store: ArtifactStoreResource) -> dg.SensorResult:
        seen = Seen.model_validate_json(context.cursor) if context.cursor else Seen()
        try:
            found = look_at_sources(experiment, seen, time.time())
        except (UnsettledError, DistillError) as err:
            return dg.SensorResult(skip_reason=f"Waits for the next look: {err}", cursor=context.cursor)
        asked = seen.asked or (found.contents if is_pool_made_from(artifact_store, found.hashes) else None)
        if found.contents == asked:
            return skip(f"The content of {len(found.hashes)} prompt files is unchanged.", found, asked)
        if runs_at_work(context):
            return skip("Prompt files changed; waits for the run that an earlier change started.", found, asked)
        number = seen.number + 1
        request = dg.RunRequest(run_key=f"{found.contents}-{number}", tags={"distill/prompt_files": found.contents})
        cursor = found.model_copy(update={"asked": found.contents, "number": number})
        return dg.SensorResult(run_requests=[request], cursor=cursor.model_dump_json())

    return new_prompt_files


def skip(reason: str, seen: Seen, asked: str | None) -> dg.SensorResult:
    """No run; what was seen is remembered, so that unchanged files are not read again."""
    return dg.SensorResult(skip_reason=reason, cursor=seen.model_copy(update={"asked": asked}).model_dump_json())


def is_pool_made_from(artifact_store: ArtifactStoreResource, hashes: Mapping[str, str]) -> bool:
    """Whether the stored prompt pool was made from files of exactly this content."""
    pool = artifact_store.open().latest("prompt_pool")
    if pool is None:
        return False
    used = [version for name, version in pool.manifest.made.inputs.items() if name.startswith("source:")]
    return sorted(used) == sorted(digest[: len(used[0])] for digest in hashes.values()) if used else False


def runs_at_work(context: dg.SensorEvaluationContext) -> bool:
    """Whether a run that this sensor started is not finished yet."""
    filters = dg.RunsFilter(job_name=PROMPTS_TO_COMPARISON, statuses=UNFINISHED, tags={"dagster/sensor_name": SENSOR_NAME})
    return context.instance.get_runs_count(filters) > 0
