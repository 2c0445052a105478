"""The graph of an experiment: one node a distinct artifact, with what it is made from and what it depends on in the file.

The orchestrator builds its assets from these nodes and the command line walks them, so both speak of the same things. A
node's code version is the hash of its own part of the experiment and of its stage's algorithm: editing a filter's threshold
changes that filter's sets and leaves the teacher's outputs alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distill_pipeline.evaluation import spec as evaluation_spec
from distill_pipeline.experiment import Experiment
from distill_pipeline.filtering import spec as filtering_spec
from distill_pipeline.generation import spec as generation_spec
from distill_pipeline.generation.spec import TeacherSpec
from distill_pipeline.hashing import version_of
from distill_pipeline.prompts import spec as prompts_spec
from distill_pipeline.scoring import spec as scoring_spec
from distill_pipeline.scoring.registry import scorer_models
from distill_pipeline.signals import spec as signals_spec
from distill_pipeline.training import spec as training_spec

Stage = Literal[
    "prompt_pool", "corrected_teacher", "teacher_outputs", "scored_outputs", "filtered_set", "teacher_signals",
    "student_checkpoint", "eval_report", "comparison",
]  # fmt: skip

STAGE_COMMANDS: Mapping[Stage, str] = {
    "prompt_pool": "prompts", "corrected_teacher": "correct", "teacher_outputs": "generate", "scored_outputs": "score",
    "filtered_set": "filter", "teacher_signals": "signals", "student_checkpoint": "train", "eval_report": "evaluate",
    "comparison": "compare",
}  # fmt: skip
"""The ``distill`` subcommand that makes each stage's artifacts."""

NO_RESULT_CHANGE = {
    "batch_tokens", "micro_batch_tokens", "gradient_checkpointing", "batch_size", "compute", "server", "budget", "vllm",
}  # fmt: skip
"""Fields that change speed, memory or cost only, wherever they stand; ``compute`` says who works, and is in no node's part."""


@dataclass(frozen=True)
class Node:
    """One artifact to be: its name in the store, its inputs' names, and the part of the experiment it depends on."""

    name: str
    stage: Stage
    inputs: tuple[str, ...]
    spec: dict[str, Any]
    code_version: str
    teacher: str | None = None
    filter: str | None = None
    student: str | None = None
    method: str | None = None

    @property
    def target(self) -> str:
        """What it is called beside its stage; empty for the only one of its stage."""
        return self.name.partition("/")[2]

    @property
    def command(self) -> str:
        """The arguments of ``distill`` after which this artifact exists, without the experiment file's path."""
        return f"distill {STAGE_COMMANDS[self.stage]} EXPERIMENT {self.target}".rstrip()


def experiment_nodes(experiment: Experiment) -> dict[str, Node]:
    """All nodes by name, in an order in which every node comes after its inputs."""
    nodes: dict[str, Node] = {}

    def add(name: str, stage: Stage, algorithm: str, spec: dict[str, Any], inputs: tuple[str, ...], **who: str | None) -> None:
        nodes[name] = Node(name, stage, inputs, spec, version_of([algorithm, _deciding(spec)]), **who)

    evaluation = experiment.evaluation.document()
    tasks = {"tasks": evaluation["tasks"], "include_path": evaluation["include_path"]}
    protected = tasks if experiment.prompt_pool.decontaminate.against else None
    pool = {"prompt_pool": experiment.prompt_pool.document(), "evaluation": protected}
    add("prompt_pool", "prompt_pool", prompts_spec.ALGORITHM, pool, ())
    for teacher, part in experiment.teachers.items():
        if part.correction is not None:
            spec = {"teacher": _teacher_model(part), "domains": list(part.domains), "seed": experiment.seed}
            add(corrected_name(teacher), "corrected_teacher", training_spec.CORRECTION_ALGORITHM, spec, ("prompt_pool",),
                teacher=teacher)  # fmt: skip
    asked = _corrected(experiment, (name for name, _ in scorer_models(experiment.scorers)))
    for teacher, part in experiment.teachers.items():
        own = _corrected(experiment, [teacher])
        outputs, scored = f"teacher_outputs/{teacher}", f"scored_outputs/{teacher}"
        answering = {key: value for key, value in part.document().items() if key != "weights"}
        scorers = {domain: [scorer.document() for scorer in listed] for domain, listed in experiment.scorers.items()}
        spec = {"teacher": answering, "seed": experiment.seed}
        if part.accept_target is not None:  # A budget decides nothing, but this part of it says which rows there are.
            spec |= {"accept_target": part.accept_target.document(), "scorers": scorers}
            own = _once(*own, *asked)
        add(outputs, "teacher_outputs", generation_spec.ALGORITHM, spec, ("prompt_pool", *own), teacher=teacher)
        spec = {"scorers": scorers}
        add(scored, "scored_outputs", scoring_spec.ALGORITHM, spec, ("prompt_pool", outputs, *asked), teacher=teacher)
        for name, rule in experiment.filters.items():
            spec = {"filter": rule.expanded(), "evaluation": protected if rule.drops("contaminated") else None}
            judged = ("prompt_pool", outputs, scored)
            add(f"filtered_set/{teacher}/{name}", "filtered_set", filtering_spec.ALGORITHM, spec, judged,
                teacher=teacher, filter=name)  # fmt: skip
    for name, (kinds, max_length) in experiment.wanted_signals().items():
        teacher, rule_name = name.split("/")
        spec = {
            "signals": experiment.signals.captured(kinds), "max_length": max_length,
            "teacher": _teacher_model(experiment.teachers[teacher]), "seed": experiment.seed if "sampled" in kinds else None,
        }  # fmt: skip
        inputs = (f"filtered_set/{name}", *_corrected(experiment, [teacher]))
        add(f"teacher_signals/{name}", "teacher_signals", signals_spec.ALGORITHM, spec, inputs,
            teacher=teacher, filter=rule_name)  # fmt: skip
    for student, recipe in experiment.students.items():
        teacher = experiment.teacher_of(student)
        frozen = experiment.teachers[teacher]
        who = {
            "teacher": "+".join(experiment.teachers_of(student)),
            "filter": "+".join(dict.fromkeys(ref.split("/")[1] for ref in recipe.data)),
            "student": student,
            "method": recipe.method,
        }
        model = _teacher_model(frozen)
        spec = {"student": recipe.document(), "teacher": model, "seed": experiment.seed}
        sets = tuple(f"filtered_set/{ref}" for ref in recipe.data)
        if recipe.signal_kinds():
            sets += _once(*(f"teacher_signals/{ref}" for ref in recipe.data))
        own = _corrected(experiment, [teacher])
        checkpoint, report = f"student_checkpoint/{student}", f"eval_report/{student}"
        add(checkpoint, "student_checkpoint", training_spec.ALGORITHM, spec, (*sets, *own), **who)
        spec = {"evaluation": evaluation, "teacher": model, "seed": experiment.seed}
        prompts = experiment.prompts_of(student)
        if prompts != frozen.system_prompts:
            spec["student_systems"] = {"system": prompts.default, "systems": dict(prompts.by_domain)}
        others = [f"student_checkpoint/{name}" for name in experiment.evaluation.baselines if name in experiment.students]
        needed = _once("prompt_pool", checkpoint, *others, *own)
        add(report, "eval_report", evaluation_spec.ALGORITHM, spec, needed, **who)
    reports = tuple(name for name, node in nodes.items() if node.stage == "eval_report")
    add("comparison", "comparison", evaluation_spec.ALGORITHM, {"students": sorted(experiment.students)}, reports)
    return nodes


def corrected_name(teacher: str) -> str:
    """The artifact of a teacher's corrected weights."""
    return f"corrected_teacher/{teacher}"


def _corrected(experiment: Experiment, names: Iterable[str]) -> tuple[str, ...]:
    """The corrected weights of those names that are teachers to be corrected."""
    return _once(*(corrected_name(name) for name in names if experiment.corrects(name)))


def _once(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _teacher_model(teacher: TeacherSpec) -> dict[str, Any]:
    """What decides a teacher's distributions on given text."""
    prompts = teacher.system_prompts
    model: dict[str, Any] = {"model": teacher.model, "revision": teacher.revision, "system": prompts.default}
    model |= {"systems": dict(prompts.by_domain)} if prompts.by_domain else {}
    model |= {"correction": teacher.correction.document()} if teacher.correction is not None else {}
    model |= {"extra_body": teacher.extra_body} if teacher.extra_body and not teacher.weights else {}
    return model | ({"weights": teacher.weights} if teacher.weights else {})


def _deciding(spec: Any) -> Any:
    """A part of the experiment without what cannot change a result."""
    if isinstance(spec, dict):
        return {key: _deciding(value) for key, value in spec.items() if key not in NO_RESULT_CHANGE}
    return [_deciding(value) for value in spec] if isinstance(spec, list) else spec
