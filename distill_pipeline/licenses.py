"""Which models' outputs may train another model: the gate that reads the dated table ``licenses.toml``.

A licence is found in this order: the experiment's ``license``, what the model says of itself (its card, the Hub's model info,
the GGUF file), the API provider that an address belongs to. A provider's terms hold beside the licence of the model it serves,
and the stricter one decides. What is refused, unknown or contradictory stops a teacher before it is fetched, loaded or asked,
unless the experiment's ``accept`` gives a reason, which goes with every artifact. The table is plain readings, no legal advice.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from distill_pipeline.errors import LicenseError
from distill_pipeline.models.declared import DeclaredLicense

Verdict = Literal["allowed", "obliged", "refused"]

TABLE = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True)
class Terms:
    """What a licence, or a provider, says about students trained on the model's outputs.

    ``verify`` is true where nobody has read the text itself; ``notice`` is shown with every copy; ``on_hub`` says whether the
    Hub's ``license`` field knows the key. ``hosts`` are patterns of a provider's hosts; ``own_models`` says that its terms are
    all there is, since it serves only its own models.
    """

    key: str
    verdict: Verdict
    clause: str
    source: str
    url: str
    read: str
    obligations: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    name_prefix: str = ""
    notice: str = ""
    non_commercial: bool = False
    verify: bool = False
    on_hub: bool = True
    hosts: tuple[str, ...] = ()
    own_models: bool = False

    @property
    def where(self) -> str:
        """Where it stands, and how sure that is."""
        return f"{self.source}, {'not verified' if self.verify else 'read'} {self.read}, {self.url}"


@dataclass(frozen=True)
class Table:
    """All terms by key and by alias."""

    date: str
    by_key: Mapping[str, Terms]

    def keys(self) -> list[str]:
        """Every key once, without aliases."""
        return sorted({terms.key for terms in self.by_key.values()})


@lru_cache(maxsize=1)
def license_table() -> Table:
    """The table as it ships with the package."""
    document = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    by_key: dict[str, Terms] = {}
    for terms in _entries(document):
        for name in (terms.key, *terms.aliases):
            assert name == normal_key(name), f"{name} is not in normal form in {TABLE.name}"
            assert name not in by_key, f"{name} stands twice in {TABLE.name}"
            by_key[name] = terms
    return Table(document["date"], by_key)


def _entries(document: Mapping[str, Any]) -> Iterator[Terms]:
    for block in document["terms"]:
        fields = {name: _frozen(value) for name, value in block.items() if name != "keys"}
        yield from (Terms(key=key, **fields) for key in block["keys"])
    for block in document["providers"]:
        fields = {name: _frozen(value) for name, value in block.items() if name != "name"}
        yield Terms(key=block["name"], on_hub=False, **fields)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def normal_key(text: str | None) -> str:
    """A licence key in the table's spelling of names: lower case, hyphens for spaces."""
    return re.sub(r"[\s_]+", "-", (text or "").strip().lower())


def known_terms(key: str | None) -> Terms | None:
    """The terms of a licence or provider, by its key or another spelling of it."""
    return license_table().by_key.get(normal_key(key))


def provider_of(urls: Iterable[str]) -> Terms | None:
    """The API provider that an address belongs to; of several the strictest."""
    hosts = [urlsplit(url).hostname or "" for url in urls]
    found = [
        terms
        for terms in dict.fromkeys(license_table().by_key.values())
        if any(fnmatchcase(host, pattern) for host in hosts for pattern in terms.hosts)
    ]
    return _strictest(found) if found else None


def check_license(
    teacher: str,
    license_key: str | None,
    accept: str | None,
    *,
    declared: DeclaredLicense | None = None,
    base_urls: Sequence[str] = (),
) -> dict[str, Any]:
    """The licence facts that go into manifests, reports and cards.

    Args:
        license_key, accept: what the experiment says.
        declared: what the model says of itself, where it can be asked.
        base_urls: where a served teacher is.
    Raises:
        LicenseError: the licence is refused, unknown or missing, or experiment and model contradict each other, and ``accept``
            gives no reason.
    """
    stated, said = normal_key(license_key), normal_key(declared.key if declared else None)
    provider = provider_of(base_urls)
    key, found_in = _found(stated, said, declared, provider)
    model = known_terms(key)
    applying = list(dict.fromkeys(terms for terms in (model, provider) if terms is not None))
    if accept is None:
        if stated and said and not _same(stated, said):
            assert declared is not None
            raise LicenseError(
                f"teacher {teacher}: the experiment says license {stated}, and {declared.where} says {said}. Correct "
                f"license:, or take it out and the model's own holds; or set accept: to the reason why {stated} is right."
            )
        for terms in applying:
            if terms.verdict == "refused":
                raise LicenseError(_refusal(teacher, terms))
        if model is None:
            raise LicenseError(_unknown(teacher, key, declared, provider))
    verdict: str = "unknown" if model is None else _strictest(applying).verdict
    return {
        "license": key or None, "license_from": found_in, "verdict": verdict,
        "clause": "; ".join(f"{terms.key}: {terms.clause} ({terms.where})" for terms in applying) or None,
        "obligations": list(dict.fromkeys(duty for terms in applying for duty in terms.obligations)),
        "notices": list(dict.fromkeys(terms.notice for terms in applying if terms.notice)),
        "name_prefix": next((terms.name_prefix for terms in applying if terms.name_prefix), None),
        "non_commercial": any(terms.non_commercial for terms in applying),
        "provider": provider.key if provider else None,
        "declared_license": said or None,
        "accepted_because": accept, "table_date": license_table().date,
    }  # fmt: skip


def _found(stated: str, said: str, declared: DeclaredLicense | None, provider: Terms | None) -> tuple[str, str | None]:
    """The licence in force, in the table's spelling where it has one, and who names it."""
    if stated:
        key, found_in = stated, "the experiment"
    elif said:
        assert declared is not None
        key, found_in = said, declared.where
    elif provider is not None and provider.own_models:
        key, found_in = provider.key, "the address"
    else:
        return "", None
    terms = known_terms(key)
    return (terms.key if terms else key), found_in


def _same(one: str, other: str) -> bool:
    return one == other or (known_terms(one) is not None and known_terms(one) == known_terms(other))


def _strictest(found: Sequence[Terms]) -> Terms:
    order: list[Verdict] = ["allowed", "obliged", "refused"]
    return max(found, key=lambda terms: order.index(terms.verdict))


def _refusal(teacher: str, terms: Terms) -> str:
    forbids = "allows only non-commercial use of" if terms.non_commercial else "forbids training on"
    return (
        f"teacher {teacher}: licence {terms.key} {forbids} its outputs ({terms.clause}; {terms.where}). "
        "Choose another teacher, or set accept: to the reason why you may."
    )


def _unknown(teacher: str, key: str, declared: DeclaredLicense | None, provider: Terms | None) -> str:
    table = license_table()
    if key:
        said = f"licence {key!r} is not in the table of {table.date}"
    else:
        said = "no licence is known"
        said += f" ({declared.where}{'' if declared.key is None else ' says so'})" if declared else ""
        said += f" ({provider.key} serves models of others, whose licence counts)" if provider else ""
    return (
        f"teacher {teacher}: {said}, so training on its outputs is refused. Read the licence. If it is one of these under "
        f"another name, set license: to {', '.join(table.keys())}; else set accept: to the reason why its outputs may train a "
        "student."
    )
