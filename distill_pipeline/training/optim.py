"""The optimizer, and the scale that keeps float16 gradients within what float16 can hold.

Float16 has nothing between 0 and 6e-8, where most gradients by logits lie, and nothing above 65,504. So the loss is scaled up
before its gradients are made, and gradients are scaled down again in float32 (Micikevicius et al. 2018, arXiv:1710.03740). A
gradient that is too large all the same is made again at half the scale.

Decided: such a step is repeated, not left out, so that every batch trains once in every precision.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from distill_pipeline.training.parallel import whole_tensor
from distill_pipeline.training.spec import TrainStageSpec

ADAM_BETAS = (0.9, 0.95)
FIRST_SCALE = 65_536.0
GROWTH_STEPS = 2000
"""Steps without overflow after which the scale is doubled; both numbers are those of torch.amp.GradScaler."""


def make_optimizer(student: Any, stage: TrainStageSpec) -> torch.optim.Optimizer:
    """AdamW in one fused pass; weight decay on matrices only."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.lr, betas=ADAM_BETAS, fused=True)


@dataclass
class LossScale:
    """By how much gradients are scaled up: 1 for ever, unless ``is_dynamic``, which is for forward passes in float16."""

    is_dynamic: bool
    scale: float = 1.0
    good_steps: int = 0

    @classmethod
    def of(cls, dtype: torch.dtype) -> "LossScale":
        """The first scale of a training whose forward passes are in ``dtype``."""
        return cls(True, FIRST_SCALE) if dtype == torch.float16 else cls(False)

    def state(self) -> dict[str, Any]:
        """What ``LossScale(**state)`` goes on from."""
        return asdict(self)

    def unscaled_norm(self, student: Any, clip_norm: float | None) -> float:
        """Scale the gradients down, then clip them; their norm before that."""
        if self.scale != 1.0:
            for parameter in student.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1.0 / self.scale)
        return float(whole_tensor(torch.nn.utils.clip_grad_norm_(student.parameters(), clip_norm or math.inf)))

    def shrink(self) -> bool:
        """Halve the scale after an overflow; False where it is 1 already."""
        if self.scale <= 1.0:
            return False
        self.scale, self.good_steps = self.scale / 2, 0
        return True

    def grow(self) -> None:
        """Count a step that did not overflow; after many the scale is doubled."""
        self.good_steps += self.is_dynamic
        if self.good_steps >= GROWTH_STEPS:
            self.scale, self.good_steps = self.scale * 2, 0
