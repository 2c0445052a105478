"""Time and peak memory of the losses on a full vocabulary: cross-entropy, naive KL, the chunked head, and stored signals.

512 positions (4 rows of 128 tokens), vocabulary 49,152, student width 576, teacher width 960, float32, forward and backward.
Each variant runs in a process of its own, so that its peak resident memory is its own; the best repeat counts.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_pipeline.models.output_head import OutputHead
from distill_pipeline.sparse_losses import sampled_targets, topk_targets
from distill_pipeline.training.head import Targets, head_loss

VOCABULARY, STUDENT_WIDTH, TEACHER_WIDTH = 49_152, 576, 960
VARIANTS = ("inputs alone", "cross-entropy", "teacher head", "naive KL", "chunked KL", "chunked KL + CE", "chunked CE",
            "top-16 KL", "sampled KL")  # fmt: skip


def peak_mib() -> float:
    """Peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def simple_targets(labels_N: Tensor) -> Targets:
    """One target a position, each with weight 1."""
    ones_N = torch.ones(len(labels_N))
    return Targets(list(range(len(labels_N) + 1)), torch.arange(len(labels_N)), labels_N, ones_N, ones_N)


def variant_step(variant: str, tokens: int, chunk_tokens: int) -> Callable[[], object]:
    """One training step of the head alone."""
    torch.manual_seed(0)
    hidden_PH = torch.randn(tokens, STUDENT_WIDTH, requires_grad=True)
    weight_VH = torch.randn(VOCABULARY, STUDENT_WIDTH).mul_(0.05).requires_grad_(True)
    teacher_PH, teacher_VH = torch.randn(tokens, TEACHER_WIDTH), torch.randn(VOCABULARY, TEACHER_WIDTH).mul_(0.05)
    labels_N = torch.randint(VOCABULARY, (tokens,))
    targets = simple_targets(labels_N)

    def chunked(ce_weight: float, with_teacher: bool = True) -> None:
        teacher = {"teacher_hidden_PH": teacher_PH, "teacher_head": OutputHead(teacher_VH)} if with_teacher else {}
        head_loss(hidden_PH, OutputHead(weight_VH), targets, num_tokens=tokens, ce_weight=ce_weight, chunk_tokens=chunk_tokens,
                  **teacher).loss.backward()  # fmt: skip

    stored = {
        "top-16 KL": topk_targets(
            torch.rand(tokens, VOCABULARY).topk(16).indices, torch.full((tokens, 16), -4.0), torch.full((tokens,), -1.5)
        ),
        "sampled KL": sampled_targets(
            torch.randint(VOCABULARY, (tokens, 16)), torch.randint(1, 9, (tokens, 16)), torch.ones(tokens)
        ),
    }

    def sparse() -> None:
        head_loss(hidden_PH, OutputHead(weight_VH), replace(targets, sparse=stored[variant]), num_tokens=tokens, ce_weight=0.0,
                  chunk_tokens=chunk_tokens).loss.backward()  # fmt: skip

    def naive() -> None:
        with torch.no_grad():
            log_p = F.log_softmax(teacher_PH @ teacher_VH.T, dim=-1)
        log_q = F.log_softmax(hidden_PH @ weight_VH.T, dim=-1)
        F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").backward()

    def teacher_head() -> Tensor:
        with torch.no_grad():
            return teacher_PH @ teacher_VH.T

    def step() -> object:
        hidden_PH.grad = weight_VH.grad = None
        match variant:
            case "inputs alone":
                weight_VH.grad = torch.ones_like(weight_VH)
            case "cross-entropy":
                F.cross_entropy(hidden_PH @ weight_VH.T, labels_N).backward()
            case "teacher head":
                teacher_head()
            case "naive KL":
                naive()
            case "chunked KL":
                chunked(0.0)
            case "chunked KL + CE":
                chunked(0.5)
            case "chunked CE":
                chunked(1.0, with_teacher=False)
            case "top-16 KL" | "sampled KL":
                sparse()
        return None

    return step


def measure(
    variant: str, tokens: int, chunk_tokens: int, repeats: int, results: "multiprocessing.Queue[dict[str, Any]]"
) -> None:
    """Run in a fresh process: seconds of the best repeat, and peak memory."""
    step = variant_step(variant, tokens, chunk_tokens)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    results.put({"variant": variant, "seconds": round(min(seconds), 4), "peak_mib": round(peak_mib(), 1)})


def run_heads(*, tokens: int, chunk_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """One row a variant: seconds, peak memory, and what of it is above inputs and gradient."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for variant in VARIANTS:
        results = context.Queue()
        process = context.Process(target=measure, args=(variant, tokens, chunk_tokens, repeats, results))
        process.start()
        rows.append(results.get())
        process.join()
    for row in rows:
        row["extra_mib"] = round(row["peak_mib"] - rows[0]["peak_mib"], 1)
    return rows
