"""What a training says while it runs: where it stands, how fast it is, how much memory it took."""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distill_pipeline.training.held_out import held_out_text
from distill_pipeline.training.position import StagePosition
from distill_pipeline.training.rollouts import StudentSampler, rollouts_text

PROGRESS_SECONDS = 5.0
GIGABYTE = 1e9


def peak_memory_bytes(device: str) -> int:
    """The most memory taken so far: of a CUDA device by this process's tensors, else by this whole process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class StageClock:
    """Times the steps of one stage. ``seconds`` since it began; a line is due every few seconds, and at the end."""

    def __init__(self, position: StagePosition, trained_tokens: int) -> None:
        self._start = self._spoke_at = self._last = time.monotonic()
        self._tokens = self._last_tokens = trained_tokens
        self._share = position.share

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def step(self, trained_tokens: int, device: str) -> dict[str, Any]:
        """The speed of the step that just ended and the memory so far, for the curve."""
        now = time.monotonic()
        speed = (trained_tokens - self._last_tokens) / max(now - self._last, 1e-9)
        self._last, self._last_tokens = now, trained_tokens
        return {"tokens_per_second": speed, "peak_memory_bytes": peak_memory_bytes(device)}

    def skip(self) -> None:
        """Leave the time since the last step out of the next one's."""
        self._last = time.monotonic()

    def line(self, position: StagePosition, curve: Sequence[Mapping[str, Any]], sampler: StudentSampler | None) -> str | None:
        """Where the stage stands after the last row of ``curve``; None while the last line is not old yet."""
        now, row = time.monotonic(), curve[-1]
        if now - self._spoke_at < PROGRESS_SECONDS and not position.is_over:
            return None
        self._spoke_at = now
        rate = (row["tokens"] - self._tokens) / max(now - self._start, 1e-9)
        left = (now - self._start) / (position.share - self._share) * (1.0 - position.share)
        return (
            f"{row['method']} {position}, loss {row['loss']:.4f}, {rate:.0f} tokens/s, {left:.0f} s left"
            f"{rollouts_text(sampler, curve)}{held_out_text(curve)}; "
            f"{row['peak_memory_bytes'] / GIGABYTE:.2f} GB at most"
        )
