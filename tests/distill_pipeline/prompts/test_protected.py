"""Laws of files of protected items: an item is its texts, whatever file it stands in, and a broken file is an error."""

import gzip
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from distill_pipeline.errors import ConfigError
from distill_pipeline.prompts.contamination import ContaminationIndex
from distill_pipeline.prompts.protected import protected_items
from distill_pipeline.prompts.spec import DedupSpec

QUESTION = "Who wrote the novel?"


def test_text_and_json_lines_protect_the_same_question(tmp_path: Path) -> None:
    (tmp_path / "items.txt").write_text(f"\n{QUESTION}\n\nAnother one here?\n", encoding="utf-8")
    lines = "\n".join(
        json.dumps(row) for row in ({"id": 7, "question": QUESTION, "choices": ["a", "b"], "ok": True}, {"q": "x?"})
    )
    (tmp_path / "items.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(json.dumps({"prompt": QUESTION, "reference": "Kim"}).encode()))
    chat = {"messages": [{"role": "user", "content": QUESTION}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat), encoding="utf-8")
    assert list(protected_items(str(tmp_path / "items.txt"), "items.txt")) == [
        ("items.txt:2", QUESTION + "\n"), ("items.txt:4", "Another one here?\n"),
    ]  # fmt: skip
    assert next(protected_items(f"file://{tmp_path}/items.jsonl", "i")) == ("i:1", f"{QUESTION}\n7\na\nb")
    for name in ("items.txt", "items.jsonl", "more.jsonl.gz", "chat.jsonl"):
        match = ContaminationIndex.build(protected_items(str(tmp_path / name), name)).match(f"{QUESTION} ")
        assert match is not None, name
        assert (match.rule, match.is_flag) == ("equal_text", False)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b'{"a": 1', "line 1 is no JSON"), (b"[1]", "must be a JSON object, it is a list"), (b"\xff\xfe", "cannot be read"),
     (None, "cannot be read")],
)  # fmt: skip
def test_a_file_that_cannot_protect_is_an_error(content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        list(protected_items(str(tmp_path / "p.jsonl"), "p.jsonl"))


def test_equal_prompts_are_one_prompt_and_the_settings_cannot_say_otherwise() -> None:
    assert DedupSpec(exact=True).exact
    with pytest.raises(ValidationError, match=r"equal prompts are one prompt.*raise its teacher's sampling\.n"):
        DedupSpec(exact=False)
