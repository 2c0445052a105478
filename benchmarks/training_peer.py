"""The peer's side of benchmarks/training.py, run by an environment that has TRL and Liger; prints one line of JSON.

    PEER_VENV/bin/python benchmarks/training_peer.py sft|gkd|distillation FOLDER --steps 8
    PEER_VENV/bin/python benchmarks/training_peer.py trl-kernel|liger-kernel - --tokens 512

TRL trains on (prompt, completion) pairs with its defaults, but in float32, without gradient checkpointing, saving or logging.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

BATCH = 16
VOCABULARY, STUDENT_WIDTH, TEACHER_WIDTH = 49_152, 576, 960


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def trainer_speed(method: str, folder: Path, steps: int) -> dict[str, Any]:
    """Samples a second of a TRL trainer over ``steps`` steps of 16 samples."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = folder.joinpath("rows.jsonl").read_text(encoding="utf-8").splitlines()[: BATCH * steps]
    rows = [
        (
            [{"role": "user", "content": row["prompt"]}],
            [{"role": "assistant", "content": row["completions"][0]}],
        )
        for row in map(json.loads, lines)
    ]
    paired = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])
    whole = Dataset.from_list([{"messages": [*prompt, *completion]} for prompt, completion in rows])
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        if name == "student" or method != "sft"
        else None
        for name in ("student", "teacher")
    )
    with tempfile.TemporaryDirectory() as out:
        common: dict[str, Any] = {
            "output_dir": out, "per_device_train_batch_size": BATCH, "max_steps": steps, "use_cpu": True, "bf16": False,
            "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "logging_strategy": "no",
            "disable_tqdm": True, "learning_rate": 1e-4, "max_length": 512,
        }  # fmt: skip
        trainer: Any
        if method == "sft":
            from trl import SFTConfig, SFTTrainer

            trainer = SFTTrainer(
                model=student,
                args=SFTConfig(**common, completion_only_loss=True),
                train_dataset=paired,
                processing_class=tokenizer,
            )
        elif method == "gkd":
            from trl.experimental.gkd import GKDConfig, GKDTrainer

            trainer = GKDTrainer(
                model=student, teacher_model=teacher, args=GKDConfig(**common, lmbda=0.0, beta=0.0, temperature=1.0),
                train_dataset=whole, processing_class=tokenizer,
            )  # fmt: skip
        else:
            raise SystemExit(f"unknown method {method}")
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return {"samples_per_second": BATCH * steps / seconds, "samples": BATCH * steps, "peak_mib": peak_mib()}


def kernel_speed(kernel: str, tokens: int, repeats: int = 4) -> dict[str, Any]:
    """Seconds of the loss on 4 rows of tokens, forward and backward, from hidden states and head weights."""
    torch.manual_seed(0)
    hidden = torch.randn(4, tokens // 4, STUDENT_WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, STUDENT_WIDTH).mul_(0.05).requires_grad_(True)
    teacher_hidden, teacher_weight = (
        torch.randn(4, tokens // 4, TEACHER_WIDTH),
        torch.randn(VOCABULARY, TEACHER_WIDTH).mul_(0.05),
    )
    labels = torch.randint(VOCABULARY, (4, tokens // 4))
    if kernel == "liger-kernel":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)

        def step() -> None:
            loss(hidden.flatten(0, 1), weight, teacher_hidden.flatten(0, 1), teacher_weight, labels.flatten()).backward()
    else:
        from trl.experimental.gkd import GKDTrainer

        def step() -> None:
            with torch.no_grad():
                teacher_logits = teacher_hidden @ teacher_weight.T
            GKDTrainer.generalized_jsd_loss(hidden @ weight.T, teacher_logits, labels=labels, beta=0.0).backward()

    seconds = []
    for _ in range(repeats):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"variant": kernel, "seconds": round(min(seconds), 4), "peak_mib": round(peak_mib(), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sft", "gkd", "trl-kernel", "liger-kernel"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    is_kernel = options.what.endswith("kernel")
    found = (
        kernel_speed(options.what, options.tokens) if is_kernel else trainer_speed(options.what, options.folder, options.steps)
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
