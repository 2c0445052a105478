"""System prompts by domain, and named texts for them.

The texts are this project's own words, after the idea of explanation tuning: a teacher that is asked to show how it gets to
an answer leaves a student more to learn from than the answer (Mukherjee et al. 2023, "Orca", arXiv:2306.02707, section 3.1).
An experiment may name one (``{preset: NAME}``) wherever a system prompt stands; the text takes the name's place when the file
is read, so manifests, request keys and versions hold the text itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Message = Mapping[str, str]

PRESETS: Mapping[str, str] = {
    "short_answer": "You give short, correct answers.",
    "explain_step_by_step": (
        "You are a helpful assistant. Work through the task step by step: say in each step what you do and why it is allowed. "
        "Check the result, then state it in one last sentence."
    ),
    "explain_simply": (
        "You are a patient teacher whose pupils are five years old. Answer in everyday words, explain each new idea with "
        "something a child has seen, and end with the answer in one short sentence."
    ),
    "teach_the_concepts": (
        "You are a teacher. Say first which facts or rules the question needs and what they mean, then apply them to the "
        "question, so that the reader could answer the next one of its kind alone. End with the answer."
    ),
    "justify_the_choice": (
        "You answer questions that have several possible answers. Weigh each of them: say what speaks for it and what rules it "
        "out. Then name the one that is left, and why."
    ),
    "break_down_the_task": (
        "You are given a task. Split it into smaller ones, solve them one after the other, say how each result is used, and "
        "put the results together at the end."
    ),
    "thorough_answer": (
        "You are a careful assistant. Give a long, well ordered answer from which nothing that matters is missing, so that the "
        "reader has no need to look anywhere else. If you are not sure of something, say so."
    ),
}
"""Texts by name."""

CHAIN_OF_THOUGHT = (
    "Before you answer, think step by step between <think> and </think>. Then give only the final answer, after </think>."
)
"""What ``chain_of_thought: true`` adds to a system prompt: the tags by which reasoning is told from the answer."""


@dataclass(frozen=True)
class SystemPrompts:
    """The system prompt of each domain; None leaves the chat template's own default."""

    default: str | None = None
    by_domain: Mapping[str, str | None] = field(default_factory=dict)
    """Of the domains that have one of their own."""

    def of(self, domain: str) -> str | None:
        """The system prompt of a domain."""
        return self.by_domain.get(domain, self.default)

    def distinct(self) -> tuple[str | None, ...]:
        """Each system prompt once, the default first."""
        return tuple(dict.fromkeys([self.default, *(self.by_domain[domain] for domain in sorted(self.by_domain))]))

    @property
    def shared(self) -> str | None:
        """The one system prompt of all domains; None where there are several, and conversations carry their own."""
        return self.default if len(self.distinct()) == 1 else None

    def told(self, messages: Sequence[Message], domain: str) -> list[Message]:
        """A conversation with its domain's system prompt, unless it has one of its own."""
        return with_system(messages, self.of(domain))

    def carried(self, messages: Sequence[Message], domain: str) -> Sequence[Message]:
        """A conversation as a renderer with the ``shared`` system prompt wants it: with its domain's where none is shared."""
        return messages if len(self.distinct()) == 1 else self.told(messages, domain)


def with_chain_of_thought(system: str | None) -> str:
    """A system prompt that asks for reasoning between think tags."""
    return CHAIN_OF_THOUGHT if system is None else f"{system}\n\n{CHAIN_OF_THOUGHT}"


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """A conversation that begins with the system prompt, or with the one it already has; None adds nothing."""
    plain: list[Message] = [{"role": message["role"], "content": message["content"]} for message in messages]
    has_own = bool(plain) and plain[0]["role"] == "system"
    return plain if system is None or has_own else [{"role": "system", "content": system}, *plain]
