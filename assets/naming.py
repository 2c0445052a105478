"""How an experiment's nodes are called, tagged and grouped in Dagster.

A node of the UI's graph shows only the last part of an asset key, so keys have one part: ``filtered_set/smollm2/verified``
is the asset ``filtered_set__smollm2__verified``. Names of an experiment hold single underscores only, so no two meet.
"""

import re
from collections.abc import Mapping
from typing import Any

import dagster as dg

from distill_pipeline.hashing import version_of
from distill_pipeline.nodes import Node, Stage

OWNERS = ["team:distillation"]

GROUPS: Mapping[Stage, str] = {
    "prompt_pool": "prompts", "corrected_teacher": "teachers", "teacher_outputs": "teachers", "scored_outputs": "data",
    "filtered_set": "data", "teacher_signals": "data", "student_checkpoint": "students", "eval_report": "evaluation",
    "comparison": "evaluation",
}  # fmt: skip

KINDS: Mapping[Stage, set[str]] = {
    "prompt_pool": {"parquet"}, "corrected_teacher": {"pytorch", "huggingface"},
    "teacher_outputs": {"parquet", "huggingface"}, "scored_outputs": {"parquet"}, "filtered_set": {"parquet"},
    "teacher_signals": {"parquet", "huggingface"},
    "student_checkpoint": {"pytorch", "huggingface"}, "eval_report": {"pytorch", "json"}, "comparison": {"json"},
}  # fmt: skip

MODEL_STEP_TAG = "distill/step"
MODEL_STEP = "model"
"""Steps that load a model carry this tag; the executor limits how many of them one run has at a time."""

MAX_TAG_CHARS = 63


def asset_key(name: str) -> dg.AssetKey:
    """The asset of a node or artifact."""
    return dg.AssetKey(name.replace("/", "__"))


def tag_value(text: str) -> str:
    """A legal tag value: letters, digits, ``_``, ``.`` and ``-``. Joined names get a dot; a long one ends in a hash."""
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "_", text.replace("+", "."))
    return slug if len(slug) <= MAX_TAG_CHARS else f"{slug[:50]}-{version_of(text)[:12]}"


def asset_tags(node: Node) -> dict[str, str]:
    """Which teacher, filter, method and student a node belongs to: ``--select 'tag:distill/teacher=smollm2'``."""
    who = {"teacher": node.teacher, "filter": node.filter, "method": node.method, "student": node.student}
    return {f"distill/{role}": tag_value(name) for role, name in who.items() if name}


def asset_options(node: Node) -> dict[str, Any]:
    """What ``@dg.asset`` is told about a node whatever its stage is."""
    return {
        "key": asset_key(node.name),
        "deps": [asset_key(name) for name in node.inputs],
        "group_name": GROUPS[node.stage],
        "kinds": KINDS[node.stage],
        "tags": asset_tags(node),
        "owners": OWNERS,
        "code_version": node.code_version,
        "metadata": {"artifact": node.name, "made_without_dagster_by": node.command},
    }
