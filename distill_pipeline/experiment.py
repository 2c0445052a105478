"""The experiment file: one YAML document that says everything a run depends on.

``load_experiment`` reads it with a safe loader and reports every fault at once, each with its path in the file and the
values that are allowed. Relative paths inside it start at the folder that holds ``experiments/`` when the file lies in a
folder of that name, and at the file's own folder otherwise, so that a file means the same from every working directory.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PrivateAttr, ValidationError

from distill_pipeline.compute.spec import ComputeSpec
from distill_pipeline.errors import ConfigError
from distill_pipeline.evaluation.spec import EvaluationSpec
from distill_pipeline.filtering.spec import FilterSpec
from distill_pipeline.generation.spec import TeacherSpec
from distill_pipeline.prompts.spec import PromptPoolSpec
from distill_pipeline.scoring.registry import scorer_fault
from distill_pipeline.scoring.spec import ScorerSpec
from distill_pipeline.signals.spec import SignalKind, SignalsSpec
from distill_pipeline.spec import ANY_DOMAIN, NAME_PATTERN, Name, Spec
from distill_pipeline.system_prompts import SystemPrompts
from distill_pipeline.training.spec import StudentSpec

_SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's loader where PyYAML has it: as safe, ten times as fast, and every command waits for it."""


class Experiment(Spec):
    """A whole experiment. Build it with :func:`load_experiment`."""

    name: Name
    seed: int = Field(0, ge=0, lt=2**63)
    prompt_pool: PromptPoolSpec
    teachers: dict[Name, TeacherSpec] = Field(min_length=1)
    scorers: dict[str, tuple[ScorerSpec, ...]] = Field(default_factory=dict, description="scorers by domain; * is any other")
    filters: dict[Name, FilterSpec] = Field(min_length=1)
    signals: SignalsSpec = SignalsSpec()
    students: dict[Name, StudentSpec] = Field(min_length=1)
    evaluation: EvaluationSpec
    compute: ComputeSpec = ComputeSpec()
    _base_dir: Path = PrivateAttr(default_factory=Path.cwd)
    _file: Path | None = PrivateAttr(None)

    @property
    def base_dir(self) -> Path:
        """Where relative paths of the file start."""
        return self._base_dir

    @property
    def file(self) -> Path | None:
        """The file that it was read from, as an absolute path; None for one that was given as data."""
        return self._file

    def resolve_path(self, path: str) -> str:
        """A path of the file as an absolute path; URLs stay as they are."""
        return path if "://" in path or Path(path).is_absolute() else str(self._base_dir / path)

    def scorers_of(self, domain: str) -> tuple[ScorerSpec, ...]:
        """The scorers of a domain: its own list, else the one under ``*``, else none."""
        return self.scorers.get(domain, self.scorers.get(ANY_DOMAIN, ()))

    def wanted_signals(self) -> dict[str, tuple[tuple[SignalKind, ...], int]]:
        """For each ``teacher/filter`` whose signals students ask for: the kinds, and the longest row that one of them takes."""
        found: dict[str, tuple[set[SignalKind], int]] = {}
        for recipe in self.students.values():
            for reference in recipe.data if recipe.signal_kinds() else ():
                kinds, longest = found.get(reference, (set(), 0))
                found[reference] = (kinds | set(recipe.signal_kinds()), max(longest, recipe.max_length))
        return {name: (tuple(sorted(kinds, reverse=True)), longest) for name, (kinds, longest) in found.items()}

    def corrects(self, name: str) -> bool:
        """Whether a name is that of a teacher which is corrected before it answers."""
        teacher = self.teachers.get(name)
        return teacher is not None and teacher.correction is not None

    def teachers_of(self, student: str) -> tuple[str, ...]:
        """The teachers of a student's data, each once."""
        return tuple(dict.fromkeys(reference.split("/")[0] for reference in self.students[student].data))

    def teacher_of(self, student: str) -> str:
        """The teacher whose distribution a student imitates and whose layers it inherits: the first of its data."""
        return self.teachers_of(student)[0]

    def data_prompts(self, student: str, teacher: str) -> SystemPrompts:
        """The system prompts under which a student reads a teacher's answers: those of the teacher, or none."""
        return SystemPrompts() if self.students[student].system == "none" else self.teachers[teacher].system_prompts

    def prompts_of(self, student: str) -> SystemPrompts:
        """The system prompts under which a student answers: in each domain that of its first teacher which answers there."""
        names = self.teachers_of(student)
        if len(names) == 1:
            return self.data_prompts(student, names[0])

        def told(domain: str) -> str | None:
            name = next((name for name in names if self.teachers[name].answers(domain)), names[0])
            return self.data_prompts(student, name).of(domain)

        default = told(ANY_DOMAIN)
        domains = {domain for name in names for domain in (*self.teachers[name].domains, *self.teachers[name].systems)}
        own = {domain: told(domain) for domain in sorted(domains - {ANY_DOMAIN})}
        return SystemPrompts(default, {domain: system for domain, system in own.items() if system != default})

    def asked_under(self, prompts: SystemPrompts) -> dict[str, str | None]:
        """The system prompt of each evaluation task."""
        domains = self.evaluation.domains
        return {task: prompts.of(domains.get(task, ANY_DOMAIN)) for task in self.evaluation.tasks}

    def require_domains(self, found: Iterable[str]) -> None:
        """Check what depends on the prompts' domains, as soon as these are known: rows may name their own.

        Args:
            found: domains of the pool's prompts; those that the sources themselves name count too.
        Raises:
            ConfigError: no prompt is in a domain that a filter or a teacher has settings for, or a teacher with
                ``accept_target`` answers one without scorers; the message lists all of them.
        """
        found = set(found)
        unscored = [
            f"teachers.{name}.budget.accept_target: {domain_without_scorers(domain)}"
            for name, teacher in self.teachers.items()
            for domain in sorted(found)
            if teacher.accept_target is not None and teacher.answers(domain) and not self.scorers_of(domain)
        ]
        if unscored:
            raise ConfigError("; ".join(unscored))
        known = {ANY_DOMAIN, *found, *(source.domain for source in self.prompt_pool.sources)}
        parts: dict[str, Iterable[str]] = {f"filters.{name}.domains": rule.domains for name, rule in self.filters.items()}
        parts |= {f"teachers.{name}.systems": teacher.systems for name, teacher in self.teachers.items()}
        faults = [
            f"{where}.{domain}: no prompt is in this domain"
            for where, domains in parts.items()
            for domain in domains
            if domain not in known
        ]
        if faults:
            there = ", ".join(sorted(known - {ANY_DOMAIN}))
            raise ConfigError(f"{'; '.join(faults)}. The prompts are in: {there}. Mend the name, or take it out.")


def domain_without_scorers(domain: str) -> str:
    """Why a teacher that is to sample until answers are accepted cannot answer a domain, and what to do."""
    return f"nothing scores the domain {domain}, so no answer in it is ever accepted; add scorers.{domain}"


def load_experiment(path: str | Path) -> Experiment:
    """Read and check an experiment file.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or has faults; the message lists all of them.
        MissingExtraError: a JSON schema cannot be checked without its package.
    """
    file = Path(path)
    try:
        document = yaml.load(file.read_text(encoding="utf-8"), Loader=_SAFE_LOADER)
    except OSError as err:
        raise ConfigError(f"cannot read the experiment file {file}: {err.strerror}. Give the path of a YAML file.") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"the experiment file {file} is not valid YAML: {err}") from err
    if not isinstance(document, dict):
        raise ConfigError(f"the experiment file {file} must be a mapping, it is a {type(document).__name__}.")
    folder = file.resolve().parent
    experiment = parse_experiment(document, origin=str(file))
    experiment._file = file.resolve()
    experiment._base_dir = folder.parent if folder.name == "experiments" else folder
    return experiment


def parse_experiment(document: Mapping[str, Any], *, origin: str = "experiment") -> Experiment:
    """Check an experiment given as data. Raises ConfigError with every fault."""
    faults: list[str] = []
    experiment = None
    try:
        experiment = Experiment.model_validate(document)
    except ValidationError as err:
        faults += [_fault_line(error) for error in err.errors()]
    faults += _cross_faults(document)
    if experiment is not None and not faults:
        faults += _task_faults(experiment)
    if faults or experiment is None:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise ConfigError(f"{origin} has {len(faults)} fault{'s' * (len(faults) != 1)}:\n{listed}")
    return experiment


def _fault_line(error: Any) -> str:
    """One pydantic error as ``path: what, and what is allowed``."""
    steps = [str(step) for step in error["loc"] if step != "[key]"]
    where = ".".join(steps) or "(top level)"
    what = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_pattern_mismatch" and error["ctx"]["pattern"] == NAME_PATTERN:
        what = "a name has lower-case letters, digits and single underscores only"
    elif error["type"] == "extra_forbidden":
        what = _unknown_field(error["loc"])
    given = error.get("input")
    shown = "" if error["type"] in {"missing", "extra_forbidden"} else f" (given: {_brief(given)})"
    return f"{where}: {what}{shown}"


def _unknown_field(location: tuple[Any, ...]) -> str:
    """What stands beside an unknown field, so that a typing mistake is seen at once."""
    model: Any = Experiment
    for step in location[:-1]:
        field = getattr(model, "model_fields", {}).get(step) if isinstance(step, str) else None
        if field is not None:
            model = _inner_model(field.annotation)
        if model is None:
            return "unknown field"
    known = ", ".join(sorted(getattr(model, "model_fields", {})))
    return f"unknown field; known: {known}" if known else "unknown field"


def _inner_model(annotation: Any) -> Any:
    """The Spec class inside an annotation such as ``dict[Name, TeacherSpec]`` or ``tuple[X, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return annotation
    for inner in reversed(getattr(annotation, "__args__", ())):
        if (found := _inner_model(inner)) is not None:
            return found
    return None


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _cross_faults(document: Mapping[str, Any]) -> Iterator[str]:
    """Faults between parts, found on the raw document so that they are reported together with the others."""
    teachers, filters = (set(_mapping(document.get(key))) for key in ("teachers", "filters"))
    for student, part in _mapping(document.get("students")).items():
        references = _mapping(part).get("data")
        for index, reference in enumerate(references if isinstance(references, list) else []):
            teacher, slash, filter_name = str(reference).partition("/")
            where = f"students.{student}.data.{index}"
            if not slash:
                yield f"{where}: write it as teacher/filter (given: {_brief(reference)})"
            elif teacher not in teachers:
                yield f"{where}: unknown teacher {teacher!r}; known: {', '.join(sorted(teachers)) or 'none'}"
            elif filter_name not in filters:
                yield f"{where}: unknown filter {filter_name!r}; known: {', '.join(sorted(filters)) or 'none'}"
    for domain, listed in _mapping(document.get("scorers")).items():
        for index, part in enumerate(listed if isinstance(listed, list) else []):
            kind = _mapping(part).get("kind")
            if isinstance(kind, str) and (fault := scorer_fault(kind, _mapping(_mapping(part).get("options")))):
                yield f"scorers.{domain}.{index}.kind: {fault}"
    yield from _corrected_scorer_faults(document)
    yield from _api_faults(document)
    yield from _signal_faults(document)
    yield from _online_faults(document)
    students = set(_mapping(document.get("students")))
    baselines = _mapping(document.get("evaluation")).get("baselines")
    for index, baseline in enumerate(baselines if isinstance(baselines, list) else []):
        if baseline not in {"teacher", "untrained"} | students:
            known = ", ".join(["teacher", "untrained", *sorted(students)])
            yield f"evaluation.baselines.{index}: unknown baseline {baseline!r}; known: {known}"
    for teacher, part in _mapping(document.get("teachers")).items():
        sampling = _mapping(_mapping(part).get("sampling"))
        n, temperature = sampling.get("n", 4), sampling.get("temperature", 0.7)
        if temperature == 0 and isinstance(n, int) and n > 1:
            yield f"teachers.{teacher}.sampling: temperature 0 is greedy, {n} samples would be equal; set n: 1"
        if _mapping(_mapping(part).get("budget")).get("accept_target"):
            yield from _target_faults(f"teachers.{teacher}.budget.accept_target", _mapping(part), document)


def _corrected_scorer_faults(document: Mapping[str, Any]) -> Iterator[str]:
    """Scorers that ask a corrected teacher at a revision: the corrected weights are there once."""
    teachers = _mapping(document.get("teachers"))
    for domain, listed in _mapping(document.get("scorers")).items():
        for index, part in enumerate(listed if isinstance(listed, list) else []):
            options = _mapping(_mapping(part).get("options"))
            name = str(options.get("model"))
            if options.get("revision") and _mapping(teachers.get(name)).get("correction") is not None:
                yield (
                    f"scorers.{domain}.{index}.options.revision: teacher {name} is corrected, and its corrected weights have "
                    "no revisions; leave it out, or give the model in the place of the teacher's name"
                )


def _target_faults(where: str, teacher: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    """Domains that a teacher is to sample for until answers are accepted, though nothing scores them."""
    scorers = _mapping(document.get("scorers"))
    domains = teacher.get("domains", [ANY_DOMAIN])
    for domain in domains if isinstance(domains, list) else []:
        if domain == ANY_DOMAIN and not any(scorers.values()):
            yield f"{where}: it counts answers that scorers accept, and the experiment has no scorers"
        elif domain != ANY_DOMAIN and isinstance(domain, str) and not scorers.get(domain, scorers.get(ANY_DOMAIN)):
            yield f"{where}: {domain_without_scorers(domain)}"


def _api_faults(document: Mapping[str, Any]) -> Iterator[str]:
    """What a student wants of a teacher that is only an API: its layers, or its distribution."""
    teachers = _mapping(document.get("teachers"))
    for student, part in _mapping(document.get("students")).items():
        references, stages = _mapping(part).get("data"), _mapping(part).get("stages")
        wanted = dict.fromkeys(str(name).split("/")[0] for name in (references if isinstance(references, list) else []))
        served = [name for name in wanted if _is_only_api(_mapping(teachers.get(name)))]
        if not served:
            continue
        name = served[0]
        otherwise = f"or set teachers.{name}.weights to the same model as a Hub id or folder"
        given = [kind for kind in ("prune", "scratch") if _mapping(_mapping(part).get("init")).get(kind)]
        if given and name == next(iter(wanted)):
            yield (
                f"students.{student}.init.{given[0]}: teacher {name} is only an API, so its layers are not here; give init: "
                f"{{model: ...}}, {otherwise}"
            )
        for index, stage in enumerate(stages if isinstance(stages, list) else []):
            if _mapping(stage).get("method") in {"logit_kd", "on_policy"}:
                yield (
                    f"students.{student}.stages.{index}.method: {stage['method']} learns the teacher's distribution, and "
                    f"teacher {name} is only an API; use sft, {otherwise}"
                )


def _is_only_api(teacher: Mapping[str, Any]) -> bool:
    return teacher.get("engine") == "openai" and not teacher.get("weights")


def _signal_faults(document: Mapping[str, Any]) -> Iterator[str]:
    """Stages that train on stored signals at a temperature for which none are stored."""
    listed = _mapping(document.get("signals")).get("temperatures", [1.0])
    temperatures = listed if isinstance(listed, list) else []
    for student, part in _mapping(document.get("students")).items():
        stages = _mapping(part).get("stages")
        for index, stage in enumerate(stages if isinstance(stages, list) else []):
            wanted = _mapping(stage).get("kd_temperature", 1.0)
            if _mapping(stage).get("signal") in ("topk", "sampled") and wanted not in temperatures:
                stored = ", ".join(map(str, temperatures))
                yield (
                    f"students.{student}.stages.{index}.kd_temperature: {_brief(wanted)} is not among signals.temperatures "
                    f"({stored}); add it there: what is stored for one temperature cannot be used at another"
                )


def _online_faults(document: Mapping[str, Any]) -> Iterator[str]:
    """Stages in which one teacher would read along although other models wrote a part of the rows."""
    teachers = _mapping(document.get("teachers"))
    for student, part in _mapping(document.get("students")).items():
        references, stages = _mapping(part).get("data"), _mapping(part).get("stages")
        wanted = dict.fromkeys(str(name).split("/")[0] for name in (references if isinstance(references, list) else []))
        names = [name for name in wanted if name in teachers]
        models = {repr(_model_of(name, _mapping(teachers[name]))) for name in names}
        for index, stage in enumerate(stages if isinstance(stages, list) and len(models) > 1 else []):
            method, signal = _mapping(stage).get("method"), _mapping(stage).get("signal", "online")
            if method == "on_policy" or (method == "logit_kd" and signal == "online"):
                yield (
                    f"students.{student}.stages.{index}: {method} has one teacher read along, and the rows are of several "
                    f"models ({', '.join(names)}). Use logit_kd with signal: topk or sampled, where each row has its own "
                    "teacher's distribution, or sft"
                )


def _model_of(name: str, teacher: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a teacher's weights from another's; each correction makes weights of its own."""
    own = name if teacher.get("correction") is not None else None
    return teacher.get("weights") or teacher.get("model"), teacher.get("revision"), own


def _task_faults(experiment: Experiment) -> Iterator[str]:
    """Where a student has several system prompts, nobody else can say which of them a task is asked under."""
    unsaid = [task for task in experiment.evaluation.tasks if task not in experiment.evaluation.domains]
    several = [name for name in experiment.students if len(experiment.prompts_of(name).distinct()) > 1]
    if unsaid and several:
        yield (
            f"evaluation.domains: student {several[0]} has system prompts by domain; say under which domain's the tasks "
            f"{', '.join(unsaid)} are asked, as {{task: domain}} ({ANY_DOMAIN} is the one of all other domains)"
        )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
