"""The ``distill`` command: every stage of an experiment without an orchestrator, one node at a time.

It is no second orchestrator: a command makes one artifact from inputs that exist, and says which command makes a missing
one. Exit status: 0 done (or nothing to do), 1 a clear error, 2 wrong usage.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from distill_pipeline import __version__
from distill_pipeline.errors import DistillError
from distill_pipeline.launching import Launch, end_with_the_launcher, is_launched, leave_error

F = TypeVar("F", bound=Callable[..., Any])


class _Commands(click.Group):
    """Turns the library's errors into one line and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DistillError as err:
            if is_launched():
                leave_error(err)
            raise click.ClickException(str(err)) from err


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Distil a large language model into a small one, step by step.

    \b
    The order of an experiment's stages:
      distill plan     experiments/quickstart.yaml                     what it will cost, before it does
      distill prompts  experiments/quickstart.yaml                     sources -> prompt pool
      distill correct  my.yaml                     smollm2             teacher + references -> corrected teacher, where wanted
      distill generate experiments/quickstart.yaml smollm2             pool -> teacher outputs
      distill score    experiments/quickstart.yaml smollm2             -> scored outputs
      distill filter   experiments/quickstart.yaml smollm2/verified    -> filtered set
      distill signals  experiments/offline.yaml    smollm2/verified    -> teacher signals, where students want them
      distill train    experiments/quickstart.yaml kl                  -> student checkpoint
      distill evaluate experiments/quickstart.yaml kl                  -> evaluation report
      distill compare  experiments/quickstart.yaml                     all students side by side
      distill lineage  kl                                              what a student was made from

    A stage whose inputs, settings and seed match what is stored does nothing and says so. Artifacts live in
    DISTILL_ROOT (default ./data).
    """


def _root_option(command: F) -> F:
    return click.option(
        "--root", envvar="DISTILL_ROOT", show_envvar=True, default="data", show_default=True,
        help="artifact store: folder or URL",
    )(command)  # fmt: skip


def _shared_options(command: F) -> F:
    """The options of whatever reads an experiment."""
    options = [
        click.argument("experiment", type=click.Path(dir_okay=False)),
        _root_option,
        click.option("--teacher-device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N"),
        click.option("--student-device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _stage_options(command: F) -> F:
    """The options every stage takes."""
    force = click.option("--force", is_flag=True, help="do the work even where a stored result matches")
    return _shared_options(force(command))


def _process_options(command: F) -> F:
    """The options of what trains a model."""
    options = [
        click.option("--processes", type=click.IntRange(1), default=1, show_default=True, envvar="DISTILL_TRAIN_PROCESSES",
                     show_envvar=True,
                     help="train in so many processes of this machine, one a GPU: torchrun starts them"),
        click.option("--shard", is_flag=True, envvar="DISTILL_TRAIN_SHARD", show_envvar=True,
                     help="give each process a part of the models' weights (FSDP2), not a copy (DDP)"),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _make(node: str, *, experiment: str, root: str, **options: Any) -> Any:
    """Make one node and say where it is."""
    from distill_pipeline.pipeline import open_pipeline

    artifact = open_pipeline(experiment, root, progress=click.echo, **options).make(node)
    _show(artifact)
    return artifact


def _show(artifact: Any) -> None:
    """Say where an artifact is, unless whoever started this process does."""
    if is_launched():
        return
    counts = ", ".join(f"{name} {number:,}" for name, number in artifact.manifest.counts.items())
    click.echo(f"{artifact.name}: {counts}\n{artifact.uri}")


@main.command()
@_stage_options
def prompts(**options: Any) -> None:
    """Build the prompt pool: read the sources, drop duplicates and what resembles the evaluation, split."""
    _make("prompt_pool", **options)


@main.command()
@_stage_options
@click.argument("teacher")
@_process_options
def correct(teacher: str, **options: Any) -> None:
    """Train TEACHER on its prompts' references before it answers; after a crash it goes on from its last checkpoint."""
    _train(f"corrected_teacher/{teacher}", **options)


@main.command()
@_stage_options
@click.argument("teacher")
def generate(teacher: str, **options: Any) -> None:
    """Let TEACHER answer the prompts that it has not answered yet."""
    _make(f"teacher_outputs/{teacher}", **options)


@main.command()
@_stage_options
@click.argument("teacher")
def score(teacher: str, **options: Any) -> None:
    """Score every completion of TEACHER."""
    _make(f"scored_outputs/{teacher}", **options)


@main.command(name="filter")
@_stage_options
@click.argument("teacher_filter", metavar="TEACHER/FILTER")
def filter_command(teacher_filter: str, **options: Any) -> None:
    """Decide which completions of a teacher train students; every rejected one stays, with its reasons."""
    _make(f"filtered_set/{teacher_filter}", **options)


@main.command()
@_stage_options
@click.argument("teacher_filter", metavar="TEACHER/FILTER")
def signals(teacher_filter: str, **options: Any) -> None:
    """Store a teacher's distributions over a filtered set's tokens, for students with signal: topk or sampled."""
    _make(f"teacher_signals/{teacher_filter}", **options)


@main.command()
@_stage_options
@click.argument("student")
@_process_options
def train(student: str, **options: Any) -> None:
    """Train STUDENT; after a crash it goes on from its last checkpoint.

    \b
    On several machines, start it under torchrun yourself, with --shard where wanted; all need the same store:
      torchrun --nnodes 2 --nproc-per-node 8 ... -m distill_pipeline.cli train EXPERIMENT STUDENT
    """
    _train(f"student_checkpoint/{student}", **options)


def _train(name: str, *, processes: int, shard: bool, **options: Any) -> None:
    """Make a node that trains a model: here, in processes that are started, or as one of those that torchrun started."""
    from distill_pipeline.joining import is_started_by_torchrun, train_together
    from distill_pipeline.pipeline import open_pipeline

    if is_launched():
        end_with_the_launcher()
    if is_started_by_torchrun():
        experiment, root = options.pop("experiment"), options.pop("root")
        artifact = train_together(open_pipeline(experiment, root, progress=click.echo, **options), name, shards=shard)
        if artifact is not None:
            _show(artifact)
    elif shard and processes == 1:
        raise click.UsageError("--shard spreads weights over processes: give --processes too, at least 2")
    else:
        _make(name, launch=Launch(processes, shard) if processes > 1 else None, **options)


@main.command()
@_stage_options
@click.argument("student")
def evaluate(student: str, **options: Any) -> None:
    """Evaluate STUDENT beside its teacher and its untrained self, and write the report."""
    artifact = _make(f"eval_report/{student}", **options)
    click.echo(f"{artifact.uri}/report.html")


@main.command()
@_stage_options
def compare(**options: Any) -> None:
    """Put all students of EXPERIMENT side by side."""
    from distill_pipeline.report.markdown import comparison_text

    artifact = _make("comparison", **options)
    click.echo(comparison_text(artifact.read_json("leaderboard.json")))
    click.echo(f"{artifact.uri}/comparison.html")


@main.command()
@_shared_options
@click.option("--no-probe", is_flag=True, help="count only; do not run the models for a few seconds to estimate time")
@click.option("--dry-run-served", is_flag=True, help="ask served models too: costs money, within budget; answers are stored")
def plan(no_probe: bool, dry_run_served: bool, **options: Any) -> None:
    """Say what EXPERIMENT will need before it runs: rows, tokens, bytes, time on this machine, dollars, and what it will yield.

    A dry run sends 20 evenly spaced prompts through each teacher, the scorers and the filters, and takes one training step of
    each correction and student. Teachers here store nothing on the way; those behind a server are asked with
    --dry-run-served only.
    """
    from distill_pipeline.pipeline import open_pipeline
    from distill_pipeline.plan_lines import plan_text
    from distill_pipeline.planning import plan_experiment

    experiment, root = options.pop("experiment"), options.pop("root")
    pipeline = open_pipeline(experiment, root, progress=lambda line: click.echo(line, err=True), **options)
    click.echo(plan_text(plan_experiment(pipeline, probe=not no_probe, dry_run_served=dry_run_served)))


@main.command()
@click.argument("student")
@_root_option
def lineage(student: str, root: str) -> None:
    """Print what STUDENT was made from, and check that the files still are what they were.

    STUDENT is a student's name, any artifact's name (filtered_set/smollm2/verified), or the folder of one.
    """
    from distill_pipeline.errors import IntegrityError, MissingInputError
    from distill_pipeline.lineage import lineage_lines, open_folder, trace
    from distill_pipeline.storage.artifacts import ArtifactStore

    if Path(student).is_dir():
        artifact = open_folder(Path(student))
    else:
        name = student if "/" in student or student in {"prompt_pool", "comparison"} else f"student_checkpoint/{student}"
        found = ArtifactStore(root).latest(name)
        if found is None:
            raise MissingInputError(f"{name} is not in {root}. Give a student's name, an artifact's name, or a folder.")
        artifact = found
    story = trace(artifact)
    for line in lineage_lines(story):
        click.echo(line)
    if story.first_difference is not None:
        raise IntegrityError(story.first_difference)


@main.command()
@_root_option
@click.option("--clean", is_flag=True, help="remove what crashed runs left behind")
def doctor(root: str, clean: bool) -> None:
    """Check this machine and the store: packages, memory, disk, devices, unfinished work, broken artifacts."""
    from distill_pipeline.doctor import examine

    findings = examine(root, clean=clean)
    for finding in findings:
        click.echo(f"{finding.mark}  {finding.what}: {finding.said}")
    if any(finding.is_bad for finding in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
