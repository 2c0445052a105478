"""Laws of drawing tokens."""

import math

import pytest
import torch

from distill_pipeline.generation.sampling import Sampling, gumbel_noise, sample_tokens

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def draw(sampling: Sampling, num_rows: int = 40_000) -> tuple[torch.Tensor, torch.Tensor]:
    seeds = torch.arange(num_rows) * 7919 + 3
    return sample_tokens(LOGITS.expand(num_rows, -1), sampling, seeds, step=5)


def expected_probs(temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The sampling distribution, written out the slow way."""
    top = LOGITS.topk(top_k).values
    probs = torch.softmax(top / temperature, dim=0)
    kept = [i for i in range(top_k) if float(probs[:i].sum()) < top_p]
    chosen = torch.zeros_like(LOGITS)
    chosen[: len(kept)] = probs[kept] / probs[kept].sum()
    return chosen


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 6, 1.0), (0.7, 3, 1.0), (1.3, 5, 0.8), (1.0, 6, 0.05), (1.0, None, 1.0), (1.7, None, 1.0), (1.0, None, 0.8)],
)
def test_frequencies_are_those_of_the_sampling_distribution(temperature: float, top_k: int | None, top_p: float) -> None:
    probs = expected_probs(temperature, top_k or len(LOGITS), top_p)
    tokens, logprobs = draw(Sampling(temperature, top_k, top_p))
    counts = torch.bincount(tokens, minlength=len(LOGITS)).double()
    assert counts[probs == 0].sum() == 0
    possible = probs > 0
    expected = probs[possible].double() * len(tokens)
    chi_square = float(((counts[possible] - expected) ** 2 / expected).sum())
    assert chi_square < 25  # 5 degrees of freedom at most: p < 2e-4
    assert torch.allclose(logprobs, probs.log()[tokens], atol=1e-5)


def test_temperature_zero_takes_the_likeliest_with_the_models_own_logprob() -> None:
    tokens, logprobs = draw(Sampling(0.0), num_rows=3)
    assert tokens.tolist() == [0, 0, 0]
    assert torch.allclose(logprobs, torch.log_softmax(LOGITS, dim=0)[0].expand(3))


def test_draws_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(0)
    logits, seeds = torch.randn(50, 100), torch.arange(50)
    for sampling in (Sampling(1.0, 20, 0.9), Sampling(1.0, None, 1.0)):
        together, _ = sample_tokens(logits, sampling, seeds, 3)
        alone = [int(sample_tokens(logits[i : i + 1], sampling, seeds[i : i + 1], 3)[0]) for i in range(50)]
        assert together.tolist() == alone


def test_a_token_without_mass_is_never_drawn() -> None:
    logits = torch.full((20_000, 9), float("-inf"))
    logits[:, [2, 5]] = 1.0
    tokens, logprobs = sample_tokens(logits, Sampling(1.0, None, 1.0), torch.arange(20_000), 0)
    assert set(tokens.tolist()) == {2, 5}
    assert torch.isfinite(logprobs).all()


def test_noise_depends_on_seed_step_and_token_and_on_nothing_else() -> None:
    ids = torch.tensor([[4, 9, 2]])
    noise = gumbel_noise(torch.tensor([11]), 2, ids)
    assert torch.equal(gumbel_noise(torch.tensor([11]), 2, ids.flip(-1)).flip(-1), noise)
    assert not torch.isclose(gumbel_noise(torch.tensor([12]), 2, ids), noise).any()
    assert not torch.isclose(gumbel_noise(torch.tensor([11]), 3, ids), noise).any()


def test_noise_is_gumbel_distributed_for_neighbouring_seeds_steps_and_tokens() -> None:
    noise = torch.cat([gumbel_noise(torch.arange(200), step, torch.arange(50).expand(200, -1)) for step in range(10)]).double()
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.04
    assert bool(noise.isfinite().all())
    columns = torch.corrcoef(noise[:, :8].T) - torch.eye(8)
    assert float(columns.abs().max()) < 0.1
