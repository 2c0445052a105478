"""TRL's chunked kernel as an independent oracle: other code, other chunks, the same divergences with the same heads.

TRL is a test dependency only; where it is not installed these laws are skipped by name.
"""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_pipeline.models.output_head import OutputHead
from distill_pipeline.training.head import Targets, head_loss

POSITIONS, VOCABULARY = 12, 301
# TRL's mixture puts beta on the teacher as ours does; its ends are the two KLs.
DIVERGENCES: list[tuple[float, str, dict[str, float]]] = [
    (0.0, "forward_kl", {}), (0.1, "jsd", {"beta": 0.1}), (0.5, "jsd", {"beta": 0.5}), (0.9, "jsd", {"beta": 0.9}),
    (1.0, "reverse_kl", {}),
]  # fmt: skip
HEADS: dict[str, tuple[bool, float, float | None]] = {
    "a matrix": (False, 1.0, None), "bias, scale and cap": (True, 0.5, 4.0)
}  # fmt: skip


@pytest.fixture(scope="module")
def kernel() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own, on import
        module = pytest.importorskip("trl.kernels.chunked_divergence", reason="trl is not installed: its kernel is no oracle")
    return module.ChunkedDivergenceFunction


def head_of(width: int, form: tuple[bool, float, float | None], generator: torch.Generator) -> OutputHead:
    weight, bias = torch.randn(VOCABULARY, width, generator=generator), torch.randn(VOCABULARY, generator=generator)
    return OutputHead(weight.requires_grad_(True), bias.requires_grad_(True) if form[0] else None, *form[1:])


@pytest.mark.parametrize(("beta", "name", "options"), DIVERGENCES)
@pytest.mark.parametrize("kd_temperature", [1.0, 2.0])
@pytest.mark.parametrize("student_form", HEADS)
@pytest.mark.parametrize("teacher_form", HEADS)
def test_value_and_gradient_are_those_of_trls_kernel(
    kernel: Any, beta: float, name: str, options: dict[str, float], kd_temperature: float, student_form: str, teacher_form: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(POSITIONS, width, generator=generator) for width in (16, 24))
    hidden.requires_grad_(True)
    student, teacher = head_of(16, HEADS[student_form], generator), head_of(24, HEADS[teacher_form], generator)
    each, ones = torch.arange(POSITIONS), torch.ones(POSITIONS)
    targets = Targets(list(range(POSITIONS + 1)), each, each, ones, ones)
    ours = head_loss(
        hidden, student, targets, num_tokens=POSITIONS, teacher_hidden_PH=teacher_hidden, teacher_head=teacher.detached(),
        divergence=name, options=options, kd_temperature=kd_temperature, ce_weight=0.0, chunk_tokens=5,
    ).loss  # fmt: skip
    divergence, _ = kernel.apply(
        hidden, student.weight_VH, student.bias_V, teacher_hidden, teacher.weight_VH.detach(),
        None if teacher.bias_V is None else teacher.bias_V.detach(), beta, kd_temperature, student.scale, student.cap,
        teacher.scale, teacher.cap,
    )  # fmt: skip
    theirs = divergence.mean() * kd_temperature**2  # TRL leaves the square out
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    learned: list[Tensor] = [x for x in (hidden, student.weight_VH, student.bias_V) if x is not None]
    for a, b in zip(torch.autograd.grad(ours, learned), torch.autograd.grad(theirs, learned), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
