"""Laws 11 and 12: what counts in the loss, once each, and that neither layout, padding nor micro-batches change it."""

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipeline.errors import TrainingError
from distill_pipeline.models.output_head import output_head
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.training.batches import MicroBatch, micro_batches
from distill_pipeline.training.examples import Example, ExampleSet, encode_examples, epoch_order
from distill_pipeline.training.loop import ModelPair, accumulate_gradients
from distill_pipeline.training.spec import TrainStageSpec
from distill_pipeline.training.trees import Layout, _common, _neighbours, sequences_of

END = 2
TOKENS = st.integers(3, 9)  # few ids, so that completions often begin alike
COMPLETION = st.lists(TOKENS, min_size=1, max_size=7).map(tuple)
EXAMPLE = st.builds(
    Example,
    st.uuids().map(str),
    st.lists(TOKENS, min_size=1, max_size=9).map(tuple),
    st.lists(COMPLETION, min_size=1, max_size=5).map(tuple),
    weight=st.sampled_from([1.0, 1.0, 0.25, 3.0]),
)
EXAMPLES = st.lists(EXAMPLE, min_size=1, max_size=5)
PACKED: tuple[Layout, Layout] = ("packed", "varlen")
LAYOUTS = st.sampled_from(["shared", *PACKED, "plain"])
STAGE = TrainStageSpec(method="logit_kd", ce_weight=0.4, kd_temperature=2.0)


@pytest.fixture(scope="module")
def models(random_model: Any) -> ModelPair:
    student, teacher = random_model(layers=2, seed=0), random_model(layers=3, seed=1)
    teacher.requires_grad_(False)
    return ModelPair(student, output_head(student), 40, teacher, output_head(teacher))


def loss_and_gradients(models: ModelPair, examples: list[Example], **options: Any) -> tuple[float, list[torch.Tensor]]:
    settings_ = {"layout": "shared", "pad_id": END, "max_tokens": 4096} | options
    stage = STAGE.model_copy(update={"micro_batch_tokens": settings_.pop("max_tokens")})
    models.student.zero_grad(set_to_none=True)
    result = accumulate_gradients(models, examples, stage, device="cpu", **settings_)
    return result.loss, [parameter.grad.clone() for parameter in models.student.parameters()]


def by_hand(models: ModelPair, examples: list[Example]) -> tuple[float, list[torch.Tensor]]:
    """The same loss from the definition: every completion alone behind its prompt, all logits, plain autograd."""
    models.student.zero_grad(set_to_none=True)
    total = sum(example.num_tokens for example in examples)
    losses = []
    for example in examples:
        for completion in example.completions:
            ids = torch.tensor([[*example.prompt, *completion]])
            where = slice(len(example.prompt) - 1, ids.shape[1] - 1)
            logits = models.student(input_ids=ids).logits[0, where]
            with torch.no_grad():
                teacher = models.teacher(input_ids=ids).logits[0, where]
            kl = F.kl_div((logits / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), log_target=True, reduction="sum") * 4
            ce = F.cross_entropy(logits, torch.tensor(completion), reduction="sum")
            losses.append(example.weight * (0.6 * kl + 0.4 * ce))
    loss = torch.stack(losses).sum() / total
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in models.student.parameters()]


def assert_same(ours: tuple[float, list[torch.Tensor]], other: tuple[float, list[torch.Tensor]]) -> None:
    assert abs(ours[0] - other[0]) < 1e-5 * max(1.0, abs(other[0]))
    scale = max(gradient.abs().max().item() for gradient in other[1])
    for a, b in zip(ours[1], other[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, scale), rtol=1e-4)


@given(examples=EXAMPLES, layout=LAYOUTS, max_tokens=st.sampled_from([1, 20, 4096]))
@settings(deadline=None, max_examples=25)
def test_loss_and_gradient_are_those_of_every_completion_alone(
    models: ModelPair, examples: list[Example], layout: str, max_tokens: int
) -> None:
    assert_same(loss_and_gradients(models, examples, layout=layout, max_tokens=max_tokens), by_hand(models, examples))


@given(examples=EXAMPLES, pad_id=st.sampled_from([0, END, 5]), max_tokens=st.sampled_from([1, 8, 30, 4096]))
@settings(deadline=None, max_examples=20)
def test_micro_batches_and_padding_change_nothing(
    models: ModelPair, examples: list[Example], pad_id: int, max_tokens: int
) -> None:
    assert_same(
        loss_and_gradients(models, examples, pad_id=pad_id, max_tokens=max_tokens), loss_and_gradients(models, examples)
    )


def predictions(batch: MicroBatch) -> dict[tuple[tuple[int, ...], int], float]:
    """(tokens seen, token predicted) -> weight, read back from the tensors through the mask."""
    found: dict[tuple[tuple[int, ...], int], float] = {}
    places, targets = batch.places_P.tolist(), batch.targets
    mask = batch.attention_mask(additive=False)
    assert (mask is None) == (batch.layout in PACKED)
    place_T = torch.arange(batch.token_ids_ST.shape[1])
    chains_STT = (place_T[:, None] >= place_T) & (place_T[:, None] < batch.end_ST[:, None, :])
    seen_STT = None if batch.layout == "plain" else chains_STT if mask is None else mask[:, 0]
    for position, target, weight in zip(
        targets.pair_position_N.tolist(), targets.pair_target_N.tolist(), targets.pair_weight_N.tolist(), strict=True
    ):
        row, column = divmod(places[position], batch.token_ids_ST.shape[1])
        ids = batch.token_ids_ST[row]
        prefix = ids[seen_STT[row, column]] if seen_STT is not None else ids[: column + 1]
        key = (tuple(prefix.tolist()), target)
        found[key] = found.get(key, 0.0) + weight
    return found


@given(examples=EXAMPLES, layout=LAYOUTS, max_tokens=st.sampled_from([1, 15, 4096]))
@settings(deadline=None, max_examples=60)
def test_every_completion_token_counts_once_behind_exactly_its_own_prefix(
    examples: list[Example], layout: Any, max_tokens: int
) -> None:
    expected: dict[tuple[tuple[int, ...], int], float] = {}
    for example in examples:
        for completion in example.completions:
            for i, token in enumerate(completion):
                key = ((*example.prompt, *completion[:i]), token)
                expected[key] = expected.get(key, 0.0) + example.weight
    found: dict[tuple[tuple[int, ...], int], float] = {}
    for batch in micro_batches(examples, layout=layout, max_tokens=max_tokens, pad_id=END):
        for key, weight in predictions(batch).items():
            found[key] = found.get(key, 0.0) + weight
    assert found == expected


def sequences_in(batch: MicroBatch) -> list[list[int]]:
    """The sequences of a packed row, as its position ids part them."""
    tokens, positions = batch.token_ids_ST[0].tolist(), batch.position_ids_ST[0].tolist()
    borders = [*(place for place, position in enumerate(positions) if position == 0), len(tokens)]
    assert positions == [i for start, end in pairwise(borders) for i in range(end - start)]
    return [tokens[start:end] for start, end in pairwise(borders)]


@given(examples=EXAMPLES, layout=LAYOUTS, max_tokens=st.integers(1, 60))
@settings(deadline=None, max_examples=60)
def test_no_forward_pass_exceeds_its_budget_unless_one_sequence_does(
    examples: list[Example], layout: Any, max_tokens: int
) -> None:
    for batch in micro_batches(examples, layout=layout, max_tokens=max_tokens, pad_id=END):
        is_row = batch.layout in PACKED
        alone = len(sequences_in(batch)) == 1 if is_row else len(batch.token_ids_ST) == 1
        assert batch.token_ids_ST.numel() <= max_tokens or alone


@given(examples=EXAMPLES, layout=st.sampled_from(PACKED), max_tokens=st.integers(1, 60))
@settings(deadline=None, max_examples=60)
def test_a_packed_row_holds_each_completion_behind_its_prompt_and_no_padding(
    examples: list[Example], layout: Any, max_tokens: int
) -> None:
    found = []
    for batch in micro_batches(examples, layout=layout, max_tokens=max_tokens, pad_id=END):
        assert batch.token_ids_ST.shape == (1, int(batch.lengths_S))
        found += sequences_in(batch)
    wanted = [[*example.prompt, *ids][:-1] for example in examples for ids in example.completions]
    assert sorted(found) == sorted(wanted)


def test_rows_stay_short_for_attention_that_computes_what_it_masks() -> None:
    examples = [Example(str(i), (3,) * 100, ((4,) * 51,)) for i in range(9)]
    packed, varlen = (
        [batch.token_ids_ST.numel() for batch in micro_batches(examples, layout=layout, max_tokens=4096, pad_id=END)]
        for layout in PACKED
    )
    assert (packed, varlen) == ([450, 450, 450], [1350])


def test_completions_that_begin_alike_are_read_once() -> None:
    example = Example("p", (3, 4), ((5, 6, 7), (5, 6, 8), (5, 6, 7)))
    (tree,) = sequences_of([example], "shared", max_tokens=60)
    assert tree.tokens == [3, 4, 5, 6]
    assert tree.targets == {(1, 5): 3, (2, 6): 3, (3, 7): 2, (3, 8): 1}


def test_prompts_that_begin_alike_are_read_once_and_never_see_each_other() -> None:
    first, second = Example("p", (1, 2, 3), ((5, 6),)), Example("q", (1, 2, 4), ((5, 7), (8, 9)))
    (tree,) = sequences_of([second, first], "shared", max_tokens=60)
    assert tree.tokens == [1, 2, 3, 5, 4, 5, 8]
    assert tree.depth == [0, 1, 2, 3, 2, 3, 3]
    assert tree.end == [7, 7, 4, 4, 7, 6, 7]
    assert tree.targets == {(2, 5): 1, (3, 6): 1, (4, 5): 1, (5, 7): 1, (4, 8): 1, (6, 9): 1}
    assert len(sequences_of([second, first], "shared", max_tokens=7)) == 2


def question(number: int, *, shared: int, own: int) -> Example:
    """A prompt of ``shared`` tokens that all have and ``own`` that no other has, and an answer of two tokens."""
    return Example(str(number), (*range(shared), *(1000 * (number + 1) + i for i in range(own))), ((1, 2),))


def sizes(examples: list[Example], max_tokens: int) -> list[int]:
    return [len(tree.tokens) for tree in sequences_of(examples, "shared", max_tokens=max_tokens)]


def test_trees_of_a_step_are_of_one_size_so_that_nothing_is_padded() -> None:
    found = sizes([question(i, shared=30, own=30) for i in range(16)], 1024)
    assert len(found) == 2
    assert len(set(found)) == 1
    uneven = sizes([question(i, shared=30, own=20 + 2 * i) for i in range(16)], 1024)
    assert max(uneven) - min(uneven) <= 10
    one_long = sizes([question(i, shared=4, own=900 if i == 0 else 50) for i in range(20)], 1024)
    assert sorted(one_long)[-2] < 200


def test_a_long_beginning_is_read_once_and_a_short_one_again_where_attention_would_cost_more() -> None:
    assert len(sizes([question(i, shared=400, own=20) for i in range(20)], 1024)) == 1
    assert len(sizes([question(i, shared=4, own=50) for i in range(20)], 1024)) > 4


@given(examples=EXAMPLES, max_tokens=st.integers(1, 60))
def test_no_cut_into_as_many_trees_has_a_smaller_largest_one(examples: list[Example], max_tokens: int) -> None:
    def cost(group: list[Example]) -> int:
        tokens = [len(example.prompt) + example.num_tokens for example in group]
        return sum(tokens) - sum(_common(a.prompt, b.prompt) for a, b in pairwise(group))

    groups = list(_neighbours(examples, max_tokens))
    ordered = sorted(examples, key=lambda example: (example.prompt, example.prompt_id))
    assert [example for group in groups for example in group] == ordered
    assert all(cost(group) <= max_tokens or len(group) == 1 for group in groups)
    cuts = combinations(range(1, len(ordered)), len(groups) - 1)
    others = [[ordered[a:b] for a, b in pairwise([0, *cut, len(ordered)])] for cut in cuts]
    assert max(map(cost, groups)) == min(max(map(cost, other)) for other in others)


@pytest.fixture
def encoded(renderer: ChatRenderer, make_batch: Any) -> Any:
    def encode(rows: list[dict[str, Any]], max_length: int = 500) -> tuple[ExampleSet, dict[str, int]]:
        return encode_examples([make_batch(rows)], renderer, max_length=max_length)

    return encode


def test_first_token_and_end_token_count_once_even_where_padding_is_the_end_token(
    renderer: ChatRenderer, encoded: Any, make_rows: Any
) -> None:
    row = make_rows(1, completions=1)[0]
    row["completions"][0]["raw_text"] = "Paris"
    examples, _ = encoded([row, make_rows(4)[3]])
    short = examples[0]
    assert renderer.end_token_id == END == short.completions[0][-1]
    assert short.prompt.count(END) >= 1  # the user's turn ends with the very same token, and is not predicted
    for batch in micro_batches([examples[0], examples[1]], layout="shared", max_tokens=4096, pad_id=END):
        found = {key: weight for key, weight in predictions(batch).items() if key[0][: len(short.prompt)] == short.prompt}
        wanted = {((*short.prompt, *short.completions[0][:i]), token): 1 for i, token in enumerate(short.completions[0])}
        assert found == wanted
        assert sum(target == END for _, target in found) == 1


def test_a_completion_that_was_cut_has_no_end_token(renderer: ChatRenderer, encoded: Any, make_rows: Any) -> None:
    row = make_rows(1, completions=2)[0]
    examples, _ = encoded([row])
    finished, cut = examples[0].completions
    assert finished[-1] == END
    assert END not in cut


def test_earlier_assistant_turns_are_prompt(renderer: ChatRenderer, encoded: Any, make_rows: Any) -> None:
    row = make_rows(1, completions=1)[0]
    turns = [("user", "capital of France?"), ("assistant", "Paris"), ("user", "the plural of mouse?")]
    row["messages"] = [{"role": role, "content": content} for role, content in turns]
    row["completions"][0]["raw_text"] = "mice"
    examples, counts = encoded([row])
    assert "Paris" in renderer.decode(examples[0].prompt)
    assert renderer.decode(examples[0].completions[0]) == "mice"
    assert counts["data_tokens"] == len(examples[0].completions[0])
    (batch,) = micro_batches([examples[0]], layout="shared", max_tokens=4096, pad_id=END)
    assert batch.places_P.min().item() == len(examples[0].prompt) - 1


def test_counts_add_up_and_name_what_was_left_out(renderer: ChatRenderer, encoded: Any, make_rows: Any) -> None:
    rows = make_rows(6, completions=3)
    rows[0]["completions"][1]["raw_text"] = ""  # cut before its first token
    longest = max(len(renderer.prompt_ids(row["messages"])) for row in rows)
    examples, counts = encoded(rows, max_length=longest + 5)
    assert counts["no_tokens"] == 1
    assert counts["too_long"] > 0
    assert counts["completions"] == counts["trained_completions"] + counts["too_long"] + counts["no_tokens"] == 18
    assert counts["trained_rows"] == len(examples)
    assert counts["data_tokens"] == sum(examples[i].num_tokens for i in range(len(examples)))
    assert examples.longest() <= longest + 5


def test_no_trainable_token_is_an_error_that_says_why(renderer: ChatRenderer, encoded: Any, make_rows: Any) -> None:
    with pytest.raises(TrainingError, match=r"of 6 completions in 2 rows, 6 are longer than max_length=16"):
        encoded(make_rows(2), max_length=16)
    with pytest.raises(TrainingError, match="of 0 completions in 0 rows"):
        encode_examples([], renderer, max_length=16)


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    assert sorted(epoch_order(50, seed=3, epoch=1)) == list(range(50))
    assert epoch_order(50, seed=3, epoch=1) == epoch_order.__wrapped__(50, seed=3, epoch=1)
    assert len({epoch_order(50, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_bfloat16_forward_passes_stay_near_float32_and_leave_float32_gradients(models: ModelPair) -> None:
    examples = [Example("p", (3, 4, 5), ((6, 7, 2), (6, 8, 9, 2)))]
    exact, _ = loss_and_gradients(models, examples)
    near, gradients = loss_and_gradients(models, examples, dtype=torch.bfloat16)
    assert abs(near - exact) < 0.03 * exact
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
