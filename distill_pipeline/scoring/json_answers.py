"""Whether an answer is JSON that fits a schema.

The schema is the scorer's option or the prompt's metadata key ``schema``.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from distill_pipeline.scoring.registry import ScoreValue
from distill_pipeline.scoring.schemas import schema_fault, validator

_BLOCK = re.compile(r"^[ \t]*```[ \t]*(?:json[c5]?)?[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL | re.IGNORECASE)
_REGEX_FAILURES = {"BacktrackLimitExceeded", "RegexEngineFailure"}


def json_schema(
    reference: str | None, answer: str, metadata: Mapping[str, Any], *, schema: dict[str, Any] | None = None
) -> ScoreValue:
    """Whether the answer (its last JSON block, else all of it) is JSON that fits the schema; the reference plays no part."""
    wanted = metadata.get("schema") if schema is None else schema
    if isinstance(wanted, str):
        try:
            wanted = json.loads(wanted)
        except ValueError as err:
            return ScoreValue(None, f"the prompt's schema is not JSON: {err}")
    if wanted is None:
        return ScoreValue(None, "there is no schema: neither the option schema nor a metadata key schema")
    text = json.dumps(wanted)
    if (fault := schema_fault(text)) is not None:
        return ScoreValue(None, f"the schema is not valid: {fault}")
    blocks = _BLOCK.findall(answer)
    try:
        given = json.loads(blocks[-1] if blocks else answer, parse_constant=_refuse, object_pairs_hook=_unique)
    except RecursionError:
        return ScoreValue(None, "the answer is nested too deeply to be read")
    except ValueError as err:
        return ScoreValue(0.0, f"not JSON: {str(err)[:200]}")
    return _verdict(text, given)


def _verdict(schema: str, given: Any) -> ScoreValue:
    first = next(iter(validator(schema).iter_errors(given)), None)
    if first is None:
        return ScoreValue(1.0, "fits the schema")
    message = first.message.split("\n")[0][:200]
    if type(first.kind).__name__.split("_")[-1] in _REGEX_FAILURES:
        return ScoreValue(None, f"the schema's pattern could not be tried: {message}")
    place = "".join(f"[{part!r}]" for part in first.instance_path)
    return ScoreValue(0.0, f"does not fit at {place or 'the top'}: {message}")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found
