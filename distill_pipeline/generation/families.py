"""Under which names a teacher's answers are kept: one family a system prompt, each with its store, together as one store.

A domain with a system prompt of its own has its answers where a teacher with that system prompt for everything has them.
So another text for one domain is another family for that domain's requests, and nobody else's.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa

from distill_pipeline.generation.budget import Usage
from distill_pipeline.generation.protocol import Completion
from distill_pipeline.generation.requests import family_of, request_key
from distill_pipeline.generation.store import GenerationStore
from distill_pipeline.storage.places import Place
from distill_pipeline.system_prompts import SystemPrompts


class Families:
    """The families of one teacher, and their stores read and written as one."""

    def __init__(
        self,
        prompts: SystemPrompts,
        settings_under: Callable[[str | None], dict[str, Any]],
        open_store: Callable[[str, dict[str, Any]], GenerationStore],
    ) -> None:
        """
        Args:
            settings_under: the settings of the family with a system prompt.
            open_store: the store of a family's name and settings.
        """
        self.prompts = prompts
        self._settings = {system: settings_under(system) for system in prompts.distinct()}
        self._names = {system: family_of(settings) for system, settings in self._settings.items()}
        self._stores = {name: open_store(name, self._settings[system]) for system, name in self._names.items()}
        self._expected: dict[str, GenerationStore] = {}
        self._last = next(iter(self._stores.values()))

    def name_of(self, domain: str) -> str:
        """The family of a domain's answers."""
        return self._names[self.prompts.of(domain)]

    def keys_of(self, prompt: Mapping[str, Any], numbers: Iterable[int]) -> list[str]:
        """The request keys of a prompt's samples."""
        family = self.name_of(prompt["domain"])
        return [request_key(family, prompt["prompt_id"], number) for number in numbers]

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the default family, and each domain's own system prompt."""
        own = {f"system of {domain}": system for domain, system in sorted(self.prompts.by_domain.items())}
        return self._settings[self.prompts.default] | own

    def facts(self) -> dict[str, Any]:
        """What the manifest says: the family, the domains that have one of their own, and the settings."""
        own = {domain: self.name_of(domain) for domain in sorted(self.prompts.by_domain)}
        default = {"family": self._names[self.prompts.default], "settings": self.settings}
        return default | ({"families": own} if own else {})

    # --- as one store: see GenerationStore ------------------------------------------------------------------------

    @property
    def folder(self) -> Place:
        """Where the answers are: the one family's folder, or the one that holds all of them."""
        folders = [store.folder for store in self._stores.values()]
        return folders[0] if len(folders) == 1 else folders[0].parent

    @property
    def paid(self) -> Usage:
        """What answers under the present settings cost, over all runs."""
        return sum((store.paid for store in self._stores.values()), Usage())

    def has(self, keys: Sequence[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """For each key whether a usable answer is on disk."""
        return np.asarray(np.any([store.has(keys) for store in self._stores.values()], axis=0), np.bool_)

    def read(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The usable answers to the given keys that are on disk."""
        return {key: answer for store in self._stores.values() for key, answer in store.read(keys).items()}

    @property
    def has_tokens(self) -> bool:
        """Whether answers are kept with their tokens."""
        return self._last.has_tokens

    def read_tokens(self, keys: Sequence[str]) -> pa.Table:
        """The tokens of the usable answers to the given keys, in some order."""
        return pa.concat_tables([store.read_tokens(keys) for store in self._stores.values()])

    def expect(self, prompt: Mapping[str, Any], keys: Iterable[str]) -> None:
        """Say, before they are asked for, whose answers to a prompt will be added."""
        if len(self._stores) > 1:
            self._expected.update(dict.fromkeys(keys, self._stores[self.name_of(prompt["domain"])]))

    def add(self, completions: Iterable[Completion]) -> None:
        """Take answers for the next flush, each for its own family; failed ones are not kept."""
        for done in completions:
            self._last = self._expected.pop(done.key, self._last)
            self._last.add([done])

    def pay(self, usage: Usage) -> None:
        """Book what answers cost beside the answers that came last."""
        self._last.pay(usage)

    def prepare(self) -> None:
        """Find out whether all can be written, before answers are paid for."""
        for store in self._stores.values():
            store.prepare()

    def flush_if_due(self) -> None:
        """Write where enough rows wait or enough time has gone by."""
        for store in self._stores.values():
            store.flush_if_due()

    def flush(self) -> None:
        """Write all waiting rows; after this call a crash cannot lose them. One store that cannot be written stops no other."""
        with ExitStack() as stores:
            for store in self._stores.values():
                stores.callback(store.flush)

    def compact(self) -> None:
        """Merge small parts where there are many."""
        for store in self._stores.values():
            store.compact()
