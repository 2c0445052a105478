"""The ``filters`` part of an experiment file, and the rule that it means for each domain.

Of two settings of one thing the nearer one counts: a domain's own, its preset's, the filter's own, the filter's preset's, the
default. What results is a :class:`FilterRule` without presets; manifests hold these, so that they say what was done, and a
preset that is changed changes the version of every set made with it.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from distill_pipeline.spec import ANY_DOMAIN, Spec

ALGORITHM = "filtered_set/2"
"""Raise when the same rule would decide otherwise."""

TEACHER_TOKENIZER = "teacher"

DropRule = Literal[
    "truncated", "refusal", "self_reference", "repetition", "language", "contaminated", "empty", "duplicate", "near_duplicate"
]
KeepRule = Literal["all", "best_of_n", "shortest"]
PresetName = Literal["math", "code", "chat", "short_answer"]
RepetitionTest = Literal["gopher", "loops", "off"]

LANGUAGE_CODES = (
    "ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr fuv fy "
    "ga gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko ku ky la lb "
    "lg lij ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru rw sa sdh se si sk "
    "sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue zh zu"
)
"""Codes (ISO 639) of the languages that the model of py3langid 0.4 tells apart."""


def _keep(value: Any) -> Any:
    if value in ("all", "best_of_n", "shortest") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("Input should be 'all', 'best_of_n', 'shortest' or the number of completions to keep, 1 or more")


def _languages(value: Any) -> Any:
    listed = [value] if isinstance(value, str) else value
    if listed is None:
        return None
    if not isinstance(listed, list | tuple) or not listed:
        raise ValueError("name a language or a list of them, for instance en or [en, de]")
    unknown = [str(code) for code in listed if code not in LANGUAGE_CODES.split()]
    if unknown:
        raise ValueError(f"unknown language {', '.join(unknown)}; known: {LANGUAGE_CODES}")
    return tuple(listed)


class RepetitionSpec(Spec):
    """How going round in circles is looked for: ``gopher`` (n-gram and line rules, and loops), ``loops`` only, or ``off``."""

    reasoning: RepetitionTest = "gopher"
    answer: RepetitionTest = "gopher"


class NearDuplicateSpec(Spec):
    """Completions of one prompt are near duplicates from this Jaccard similarity of their word 5-grams on."""

    threshold: float = Field(0.8, gt=0.0, le=1.0)


class LengthSpec(Spec):
    """Tokens a completion may have, reasoning included: at least and at most."""

    min_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    tokenizer: str = Field(
        TEACHER_TOKENIZER, min_length=1,
        description="whose tokens: teacher (as the teacher counted them, end token included), or a model reference",
    )  # fmt: skip

    @model_validator(mode="after")
    def _is_a_range(self) -> "LengthSpec":
        if self.min_tokens is None and self.max_tokens is None:
            raise ValueError("give min_tokens, max_tokens or both")
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        return self


class DifficultySpec(Spec):
    """A band of pass rates, ends included: the share of a prompt's completions of known score that are correct."""

    min: float = Field(0.0, ge=0.0, le=1.0)
    max: float = Field(1.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _is_a_range(self) -> "DifficultySpec":
        if self.min > self.max:
            raise ValueError(f"min {self.min:g} is more than max {self.max:g}")
        return self


class DiversitySpec(Spec):
    """Of a prompt's completions, best first, only those no more similar than this to any that is kept already."""

    max_similarity: float = Field(ge=0.0, lt=1.0)


class FilterRule(Spec):
    """Which completions of one domain train a student. Held-out prompts and failed rows never do."""

    min_score: float | None = Field(None, ge=0.0, le=1.0, description="every known score at least this; unknown rejects")
    keep: Annotated[KeepRule | int, BeforeValidator(_keep)] = Field(
        "all", description="of a prompt's accepted completions: all, the best score, the shortest, or the best so many"
    )
    max_per_prompt: int | None = Field(None, ge=1, description="and at most this many of them")
    drop: tuple[DropRule, ...] = ()
    repetition: RepetitionSpec = RepetitionSpec()
    language: Annotated[tuple[str, ...] | None, BeforeValidator(_languages)] = Field(
        None, description="languages that answers may have: turns the rule language on; null turns it off"
    )
    near_duplicate: NearDuplicateSpec | None = Field(None, description="turns the rule near_duplicate on; null turns it off")
    length: LengthSpec | None = None
    difficulty: DifficultySpec | None = None
    diversity: DiversitySpec | None = None

    @property
    def correct_score(self) -> float:
        """The score from which on a completion counts as correct."""
        return 1.0 if self.min_score is None else self.min_score

    @property
    def most_per_prompt(self) -> int | None:
        """The most completions of a prompt that can be accepted; None for all."""
        chosen = self.keep if isinstance(self.keep, int) else None if self.keep == "all" else self.max_per_prompt or 1
        limits = [limit for limit in (chosen, self.max_per_prompt) if limit is not None]
        return min(limits, default=None)


class _WithPreset(FilterRule):
    preset: PresetName | None = Field(None, description="a named set of rules; other settings beside it go before it")

    def given(self) -> dict[str, Any]:
        """What is written out here."""
        return {name: getattr(self, name) for name in FilterRule.model_fields if name in self.model_fields_set}


class DomainSpec(_WithPreset):
    """What a filter does otherwise in one domain."""


class FilterSpec(_WithPreset):
    """Which completions train a student, and what is different in single domains."""

    domains: dict[str, DomainSpec] = Field(default_factory=dict, description="other settings for single domains")
    _rules: dict[str, FilterRule] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _names_its_languages(self) -> "FilterSpec":
        for domain in (ANY_DOMAIN, *self.domains):
            if "language" in self.of(domain).drop and self.of(domain).language is None:
                where = "" if domain == ANY_DOMAIN else f" in domain {domain}"
                raise ValueError(f"drop names language{where}; say which ones may stay, for instance language: en")
        return self

    def of(self, domain: str) -> FilterRule:
        """The rule of a domain; one without settings of its own has that of ``*``."""
        domain = domain if domain in self.domains else ANY_DOMAIN
        if domain not in self._rules:
            own = [self.domains[domain]] if domain in self.domains else []
            self._rules[domain] = _merged(self, *own)
        return self._rules[domain]

    def rules(self) -> Iterator[FilterRule]:
        """Every different rule."""
        yield from (self.of(domain) for domain in (ANY_DOMAIN, *self.domains))

    def drops(self, name: DropRule) -> bool:
        """Whether the rule is asked for in any domain."""
        return any(name in rule.drop for rule in self.rules())

    def tokenizers(self) -> tuple[str, ...]:
        """References of the models whose tokenizers count lengths."""
        named = {rule.length.tokenizer for rule in self.rules() if rule.length is not None}
        return tuple(sorted(named - {TEACHER_TOKENIZER}))

    def expanded(self) -> dict[str, Any]:
        """The rule of each domain as JSON-able data, presets and defaults written out; ``*`` is every other domain."""
        return {domain: self.of(domain).document() for domain in (ANY_DOMAIN, *sorted(self.domains))}


_SWITCHES: tuple[DropRule, ...] = ("language", "near_duplicate")
"""Rules that their own setting turns on, and null turns off."""


def _merged(*levels: _WithPreset) -> FilterRule:
    """One rule of several levels, the nearest last."""
    fields: dict[str, Any] = {name: info.get_default() for name, info in FilterRule.model_fields.items()}
    switched: dict[str, bool] = {}
    for level in levels:
        given = level.given()
        fields |= PRESETS[level.preset] if level.preset else {}
        fields |= given
        switched |= {name: given[name] is not None for name in _SWITCHES if name in given}
    off = {name for name, is_on in switched.items() if not is_on}
    on = [name for name, is_on in switched.items() if is_on]
    fields["drop"] = tuple(name for name in dict.fromkeys((*fields["drop"], *on)) if name not in off)
    if "near_duplicate" in fields["drop"]:
        fields["near_duplicate"] = fields["near_duplicate"] or NearDuplicateSpec()
    return FilterRule.model_construct(**fields)


_ALWAYS: tuple[DropRule, ...] = ("empty", "truncated", "refusal", "contaminated", "self_reference", "repetition")
PRESETS: dict[PresetName, dict[str, Any]] = {
    "math": {
        "drop": (*_ALWAYS, "near_duplicate"),
        "repetition": RepetitionSpec(reasoning="loops", answer="loops"),
        "near_duplicate": NearDuplicateSpec(threshold=0.8),
    },
    "code": {
        "drop": (*_ALWAYS, "near_duplicate"),
        "repetition": RepetitionSpec(reasoning="gopher", answer="loops"),
        "near_duplicate": NearDuplicateSpec(threshold=0.9),
    },
    "chat": {
        "drop": (*_ALWAYS, "near_duplicate"),
        "repetition": RepetitionSpec(reasoning="gopher", answer="gopher"),
        "near_duplicate": NearDuplicateSpec(threshold=0.8),
    },
    "short_answer": {
        "drop": (*_ALWAYS, "duplicate"),
        "repetition": RepetitionSpec(reasoning="gopher", answer="loops"),
    },
}
"""Named sets of rules. Derivations and programs say the same words again and again, so of them only loops are looked for;
short answers to one question are rightly alike, so only equal ones are dropped. Rules for web pages (braces, full stops, 50
words, letters a word) are in none of them. None sets ``min_score``: what is correct is the experiment's to say."""
