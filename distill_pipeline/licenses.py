"""Which models' outputs may train another model: a dated table, and the gate that reads it.

The table restates licence texts in plain words as they stood on ``TABLE_DATE``; it is no legal advice. Keys are those of
the model hub's ``license`` field, lower case. A refused or unknown licence stops a teacher before any request, unless the
experiment's ``accept`` gives a reason, which is recorded with every artifact.
"""

from dataclasses import dataclass
from typing import Literal

from distill_pipeline.errors import LicenseError

TABLE_DATE = "2026-11-24"


@dataclass(frozen=True)
class LicenseTerms:
    """What a licence says about students trained on the model's outputs."""

    key: str
    verdict: Literal["free", "conditional", "refused"]
    obligations: tuple[str, ...]
    clause: str


def _rows(
    verdict: Literal["free", "conditional", "refused"], keys: str, clause: str, *obligations: str
) -> dict[str, LicenseTerms]:
    return {key: LicenseTerms(key, verdict, obligations, clause) for key in keys.split()}


TERMS: dict[str, LicenseTerms] = {
    **_rows("free", "apache-2.0 mit bsd bsd-2-clause bsd-3-clause cc0-1.0 unlicense openmdw-1.1", "no terms on outputs"),
    **_rows("conditional", "cc-by-4.0 cc-by-sa-4.0", "attribution", "name the author and the licence"),
    **_rows(
        "conditional", "llama3.1 llama3.2 llama3.3 llama4", "Llama Community License 1.b.i",
        "the student's name begins with Llama", "show 'Built with Llama'", "pass on the acceptable use policy",
    ),
    **_rows(
        "conditional", "qwen tongyi-qianwen", "Tongyi Qianwen License 4.b", "show 'Built with Qwen' or 'Improved using Qwen'"
    ),
    **_rows(
        "conditional", "gemma", "Gemma Terms 1.1(e), 3.1: a student is a model derivative",
        "pass on the Gemma terms and the prohibited use policy",
    ),
    **_rows(
        "conditional", "openrail openrail++ bigscience-openrail-m creativeml-openrail-m deepseek falcon-llm-license "
        "nvidia-open-model-license",
        "use-based restrictions", "pass on the use restrictions",
    ),
    **_rows("refused", "llama2 llama3", "Llama Community License 1.b.v: outputs may not improve another language model"),
    **_rows("refused", "tencent-hunyuan-community", "outputs may not improve another AI model"),
    **_rows(
        "refused", "cc-by-nc-2.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-nc-nd-4.0 qwen-research mnpl mrl exaone",
        "non-commercial use only", "the student is for non-commercial use only",
    ),
    **_rows("refused", "openai anthropic google-gemini-api", "API terms: outputs may not develop competing models"),
}  # fmt: skip


def check_license(teacher: str, license_key: str | None, accept: str | None) -> dict[str, object]:
    """The licence facts that go into manifests and cards.

    Raises:
        LicenseError: the licence is refused, unknown or missing, and ``accept`` gives no reason.
    """
    key = (license_key or "").lower().strip()
    terms = TERMS.get(key)
    if accept is None:
        if terms is None:
            said = f"licence {key!r} is not in the table of {TABLE_DATE}" if key else "no licence is known"
            raise LicenseError(
                f"teacher {teacher}: {said}, so training on its outputs is refused. Set license: to one of "
                f"{', '.join(sorted(TERMS))}, or set accept: to the reason why its outputs may train a student."
            )
        if terms.verdict == "refused":
            raise LicenseError(
                f"teacher {teacher}: licence {key} forbids training on its outputs ({terms.clause}). "
                "Choose another teacher, or set accept: to the reason why you may."
            )
    return {
        "license": key or None,
        "verdict": terms.verdict if terms else "unknown",
        "clause": terms.clause if terms else None,
        "obligations": list(terms.obligations) if terms else [],
        "accepted_because": accept,
        "table_date": TABLE_DATE,
    }
