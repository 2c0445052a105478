"""Whether an answer is JSON that fits a schema.

The schema is the scorer's option or the prompt's metadata key ``schema``. It may refer to parts of itself only: nothing is
fetched and no file is opened for a ``$ref``. Validation is jsonschema-rs, of the draft that ``$schema`` names (2020-12
without it), formats included.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from distill_pipeline.errors import ConfigError
from distill_pipeline.scoring.registry import ScoreValue

_BLOCK = re.compile(r"^[ \t]*```[ \t]*(?:json[c5]?)?[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL | re.IGNORECASE)
_REGEX_FAILURES = {"BacktrackLimitExceeded", "RegexEngineFailure"}
_HINT = "Install it: pip install 'distill-pipeline[scorers]'"


def require_jsonschema() -> None:
    """Raises ConfigError where jsonschema-rs is not installed."""
    try:
        import jsonschema_rs  # noqa: F401
    except ImportError as err:
        raise ConfigError(f"it needs the package jsonschema-rs ({err}). {_HINT}") from err


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


@lru_cache(maxsize=64)
def schema_fault(schema: str) -> str | None:
    """What is wrong with a schema, given as JSON text, or None."""
    try:
        _validator(schema)
    except (ValueError, RecursionError) as err:
        return str(err).split("\n")[0][:300]
    return None


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    import jsonschema_rs

    return jsonschema_rs.validator_for(json.loads(schema), validate_formats=True, retriever=_no_retrieval)


def _verdict(schema: str, given: Any) -> ScoreValue:
    first = next(iter(_validator(schema).iter_errors(given)), None)
    if first is None:
        return ScoreValue(1.0, "fits the schema")
    message = first.message.split("\n")[0][:200]
    if type(first.kind).__name__.split("_")[-1] in _REGEX_FAILURES:
        return ScoreValue(None, f"the schema's pattern could not be tried: {message}")
    place = "".join(f"[{part!r}]" for part in first.instance_path)
    return ScoreValue(0.0, f"does not fit at {place or 'the top'}: {message}")


def _no_retrieval(uri: str) -> Any:
    raise ValueError(f"a schema may refer only to parts of itself, not to {uri}")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found
