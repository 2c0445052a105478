"""Laws of ``top_logprobs``: ids and likeliest tokens from every engine that knows them, and nothing changes without."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distill_pipeline.generation.opening import TeacherModel
from distill_pipeline.generation.served import ServedModel
from distill_pipeline.generation.server.replies import token_logprobs
from distill_pipeline.generation.spec import TeacherSpec
from distill_pipeline.generation.stage import generate_outputs
from distill_pipeline.models.load import load_model, load_tokenizer
from distill_pipeline.models.resolve import resolve_model
from distill_pipeline.outcome import Outcome, silent
from distill_pipeline.records import COMPLETION_SCHEMA, PROMPT_SCHEMA, prompt_id
from distill_pipeline.rendering import ChatRenderer

K = 3


def pool(number: int) -> pa.RecordBatch:
    rows = []
    for index in range(number):
        messages = [{"role": "user", "content": f"what is {index} plus {index}?"}]
        known = {"reference": None, "domain": "sums", "source": "t", "license": "cc0-1.0", "split": "train", "metadata": "{}"}
        rows.append({"prompt_id": prompt_id(messages), "messages": messages, **known})
    return pa.RecordBatch.from_pylist(rows, schema=PROMPT_SCHEMA)


class Bench:
    """Runs the stage over one generation store."""

    def __init__(self, folder: Path, model: TeacherModel, teacher: Mapping[str, Any]) -> None:
        self.folder, self.model, self.teacher = folder, model, teacher

    def run(self, number: int = 5, **fields: Any) -> Outcome:
        self.out_dir = self.folder / f"out{len(list(self.folder.glob('out*')))}"
        self.out_dir.mkdir()
        return generate_outputs(
            [pool(number)], self.out_dir, teacher_name="big", teacher=TeacherSpec.model_validate({**self.teacher, **fields}),
            model=self.model, generations_dir=self.folder / "generations", device="cpu", seed=0, progress=silent,
        )  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        return list(pq.read_table(self.out_dir / "part-00000.parquet", schema=COMPLETION_SCHEMA).to_pylist())

    def tokens(self) -> list[dict[str, Any]]:
        return list(pq.read_table(self.out_dir / "tokens-00000.parquet").to_pylist())


@pytest.fixture
def local(tmp_path: Path, tiny_model_dir: Path) -> Bench:
    model = resolve_model(str(tiny_model_dir), models_dir=tmp_path / "models", progress=silent)
    return Bench(tmp_path, model, {"model": "tiny", "sampling": {"n": 2, "temperature": 0.8, "top_k": 5, "max_tokens": 10}})


def test_tokens_are_the_models_own_log_probabilities_at_temperature_one(local: Bench, tiny_model_dir: Path) -> None:
    outcome = local.run(top_logprobs=K)
    rows, tokens = local.rows(), local.tokens()
    assert [token["completion_id"] for token in tokens] == [row["completion_id"] for row in rows]
    assert outcome.facts["with_tokens"] == len(rows) == 10
    model, renderer = load_model(tiny_model_dir), ChatRenderer(load_tokenizer(tiny_model_dir))
    for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        ids = token["token_ids"]
        assert len(ids) == row["completion_tokens"]
        assert (ids[-1] in renderer.stop_token_ids) == (row["finish_reason"] == "stop")
        assert renderer.decode([i for i in ids if i not in renderer.stop_token_ids]) == row["raw_text"]
        prompt = renderer.prompt_ids([{"role": "user", "content": f"what is {index // 2} plus {index // 2}?"}])
        with torch.inference_mode():
            whole = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
        expected = whole.log_softmax(dim=-1)
        assert token["token_logprobs"] == pytest.approx(expected[range(len(ids)), ids].tolist(), abs=1e-3)
        top = expected.topk(K, dim=-1)
        assert token["top_logprobs"] == pytest.approx(top.values.flatten().tolist(), abs=1e-3)
        assert token["top_ids"] == top.indices.flatten().tolist()


def test_tokens_are_stored_with_the_answers_and_asked_once(local: Bench) -> None:
    local.run(top_logprobs=K)
    first = (local.out_dir / "tokens-00000.parquet").read_bytes()
    outcome = local.run(top_logprobs=K)
    assert outcome.counts["generated"] == 0
    assert (local.out_dir / "tokens-00000.parquet").read_bytes() == first
    grown = local.run(7, top_logprobs=K)
    assert (grown.counts["generated"], len(local.tokens())) == (4, 14)


def test_nobody_who_does_not_ask_sees_a_difference(local: Bench) -> None:
    plain = local.run()
    before = (local.out_dir / "part-00000.parquet").read_bytes()
    assert not list(local.out_dir.glob("tokens-*"))
    assert "top_logprobs" not in plain.facts["settings"]
    assert "with_tokens" not in plain.facts
    stored = next((local.folder / "generations" / plain.facts["family"]).glob("part-*"))
    assert "token_ids" not in pq.read_schema(stored).names
    asked = local.run(top_logprobs=K)
    assert asked.facts["settings_changed"] == {"top_logprobs": [None, K]}
    assert local.run().counts["generated"] == 0
    assert (local.out_dir / "part-00000.parquet").read_bytes() == before


@pytest.fixture
def served(tmp_path: Path, server: Any) -> Bench:
    where = {"base_url": server.url, "samples_per_request": 1}
    teacher = {"model": "fake-model", "engine": "openai", "server": where, "sampling": {"n": 1, "max_tokens": 8}}
    spec = TeacherSpec.model_validate(teacher)
    assert spec.server is not None
    return Bench(tmp_path, ServedModel("fake-model", None, spec.server), teacher)


def step(token: int, prefix: str = "token_id:") -> dict[str, Any]:
    top = [{"token": f"{prefix}{token + i}", "logprob": -0.5 - i} for i in range(2)]
    return {"token": f"{prefix}{token}", "logprob": -0.5, "top_logprobs": top}


def says(steps: list[dict[str, Any]]) -> Callable[[str, Any], dict[str, Any]]:
    choice = {"message": {"content": "yes"}, "finish_reason": "stop", "logprobs": {"content": steps}}
    return lambda prompt, body: {"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": len(steps)}}


def test_a_server_is_asked_for_ids_and_gives_them_as_it_can(served: Bench, server: Any) -> None:
    server.script = says([step(7), step(9)])
    served.run(2, top_logprobs=2)
    assert all(body["logprobs"] is True and body["top_logprobs"] == 2 for body in server.bodies)
    assert all(body["return_tokens_as_token_ids"] is True for body in server.bodies)
    first, _ = served.tokens()
    assert (first["token_ids"], first["top_ids"]) == ([7, 9], [7, 8, 9, 10])
    assert first["top_logprobs"] == pytest.approx([-0.5, -1.5, -0.5, -1.5])
    assert served.rows()[0]["logprob"] == pytest.approx(-1.0)


def test_tokens_that_a_server_names_by_text_are_left_out_and_counted(served: Bench, server: Any) -> None:
    server.script = says([step(7, prefix=" word"), step(9, prefix=" word")])
    outcome = served.run(3, top_logprobs=2)
    assert (outcome.facts["with_tokens"], served.tokens()) == (0, [])
    assert (outcome.counts["stopped"], served.rows()[0]["logprob"]) == (3, pytest.approx(-1.0))
    assert token_logprobs([]) is None


def test_tokens_stay_exact_in_their_columns(served: Bench, server: Any) -> None:
    server.script = says([step(49_151)] * 3)
    served.run(1, top_logprobs=2)
    table = pq.read_table(served.out_dir / "tokens-00000.parquet")
    assert table.schema.field("token_ids").type == pa.list_(pa.int32())
    assert table.schema.field("top_logprobs").type == pa.list_(pa.float32())
    assert np.array(table["top_ids"].to_pylist()[0]).reshape(3, 2).tolist() == [[49_151, 49_152]] * 3
    assert math.isclose(sum(table["token_logprobs"].to_pylist()[0]), -1.5)
