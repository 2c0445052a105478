"""JSON Schemas, checked and compiled.

A schema may refer to parts of itself only: nothing is fetched and no file is opened for a ``$ref``. Validation is
jsonschema-rs, of the draft that ``$schema`` names (2020-12 without it), formats included.
"""

import json
from functools import lru_cache
from typing import Any

from distill_pipeline.errors import MissingExtraError


def require_jsonschema() -> None:
    """Raises MissingExtraError where jsonschema-rs is not installed."""
    try:
        import jsonschema_rs  # noqa: F401
    except ImportError as err:
        raise MissingExtraError.of("the scorer json_schema", f"jsonschema-rs ({err})", "scorers") from err


@lru_cache(maxsize=64)
def schema_fault(schema: str) -> str | None:
    """What is wrong with a schema, given as JSON text, or None."""
    try:
        validator(schema)
    except (ValueError, RecursionError) as err:
        return str(err).split("\n")[0][:300]
    return None


@lru_cache(maxsize=64)
def validator(schema: str) -> Any:
    """The validator of a schema given as JSON text; raises ValueError where it is no schema."""
    import jsonschema_rs

    return jsonschema_rs.validator_for(json.loads(schema), validate_formats=True, retriever=_no_retrieval)


def _no_retrieval(uri: str) -> Any:
    raise ValueError(f"a schema may refer only to parts of itself, not to {uri}")
