"""Laws of near-duplicate search: copies go, siblings of a template stay, and MinHash agrees with an independent one."""

import random
from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipeline.ngrams import tokens
from distill_pipeline.prompts.near_dedup import NearDuplicates, first_occurrences, rows_per_band, shingles_of

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]


def repeats(folder: Path, prompts: list[tuple[str, str | None]], threshold: float = 0.85) -> list[int]:
    folder.mkdir(exist_ok=True)
    near = NearDuplicates(folder, threshold)
    for text, reference in prompts:
        near.add([{"role": "user", "content": text}], reference)
    found = near.find().tolist()
    near.close()
    return [int(index) for index in found]


def text_of(seed: int, num_words: int = 100) -> list[str]:
    return random.Random(seed).choices(WORDS, k=num_words)


LONG = text_of(1)


def with_slot(filler: str, at: int = 50) -> str:
    return " ".join([*LONG[:at], filler, *LONG[at + 1 :]])


def test_layout_case_and_punctuation_make_no_new_prompt(tmp_path: Path) -> None:
    prompts = [
        ("What is the capital of France?", None),
        ("what is the capital of  France", None),
        ("WHAT is the capital of France!", None),
    ]
    assert repeats(tmp_path, prompts) == [-1, 0, 0]


def test_words_added_to_a_long_prompt_make_no_new_prompt(tmp_path: Path) -> None:
    longer = " ".join([*LONG, "please"])
    shorter = " ".join(LONG[:40] + LONG[41:])
    assert repeats(tmp_path, [(" ".join(LONG), None), (longer, None), (shorter, None)]) == [-1, 0, 0]


@pytest.mark.parametrize("reference", [None, "yes"])
def test_short_templates_are_not_eaten(reference: str | None, tmp_path: Path) -> None:
    names = ["France", "Italy", "Peru", "New Zealand", "the United States", "Chad"]
    assert repeats(tmp_path, [(f"What is the capital of {name}?", reference) for name in names]) == [-1] * 6


@pytest.mark.parametrize("reference", [None, "yes"])
@pytest.mark.parametrize("at", [0, 50, 99])
def test_long_templates_are_not_eaten(reference: str | None, at: int, tmp_path: Path) -> None:
    fillers = ["France", "Italy", "Peru", "New Zealand", "the United States of America", "Chad"]
    assert repeats(tmp_path, [(with_slot(name, at), reference) for name in fillers]) == [-1] * 6


def test_two_slots_of_a_long_template_are_not_eaten(tmp_path: Path) -> None:
    prompts = [
        (with_slot(f"{a} {' '.join(LONG[:3])} {b}"), None) for a in ("red", "dark green") for b in ("cat", "dog", "old mule")
    ]
    assert repeats(tmp_path, prompts) == [-1] * 6


def test_a_copy_inside_a_template_family_is_found(tmp_path: Path) -> None:
    prompts = [(with_slot(name), None) for name in ("France", "Italy", "Peru", "Chad")]
    copy = (with_slot("Peru").replace(LONG[3], LONG[3].upper() + ",") + " thanks", None)
    assert repeats(tmp_path, [*prompts, copy]) == [-1, -1, -1, -1, 2]


def test_one_replaced_word_without_a_family_is_a_duplicate(tmp_path: Path) -> None:
    assert repeats(tmp_path, [(with_slot("colour"), None), (with_slot("color"), None)]) == [-1, 0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("7", "8"),
        ("7 + 3", "7 - 3"),
        ("1,000", "1000,5"),
        ("is", "is not"),
        ("x < y", "x > y"),
        ("3 * 4", "3 / 4"),
        ("2.5", "25"),
    ],
)
def test_numbers_operators_and_negations_make_another_prompt(one: str, other: str, tmp_path: Path) -> None:
    assert repeats(tmp_path, [(with_slot(one), None), (with_slot(other), None)]) == [-1, -1]


def test_another_reference_makes_another_prompt_and_another_layout_of_it_does_not(tmp_path: Path) -> None:
    longer = " ".join([*LONG, "please"])
    assert repeats(tmp_path / "a", [(" ".join(LONG), "Paris"), (longer, "Rome"), (longer, None)]) == [-1, -1, -1]
    assert repeats(tmp_path / "b", [(" ".join(LONG), "Paris"), (longer, " paris.")]) == [-1, 0]


def test_a_shared_system_prompt_or_history_proves_nothing(tmp_path: Path) -> None:
    near = NearDuplicates(tmp_path, 0.85)
    system = {"role": "system", "content": " ".join(LONG)}
    for question in ("Why is the sky blue?", "How do planes fly?"):
        near.add([system, {"role": "user", "content": question}], None)
    near.add([system | {"content": "Be brief."}, {"role": "user", "content": "How do planes fly?"}], None)
    assert near.find().tolist() == [-1, -1, -1]
    near.close()


def test_prompts_without_words_are_told_apart(tmp_path: Path) -> None:
    assert repeats(tmp_path, [("🙂", None), ("🙃", None), ("🙂", None), ("你好吗", None), ("你好啊", None)]) == [
        -1,
        -1,
        0,
        -1,
        -1,
    ]


def edited(rng: random.Random, text: list[str]) -> list[str]:
    """Some words added or left out, so that pairs lie on both sides of the threshold."""
    text = list(text)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text))
        text[at : at + rng.randint(0, 1)] = rng.choices(WORDS, k=1) if rng.random() < 0.5 else []
    return text


def by_datasketch(texts: list[str], threshold: float) -> list[int]:
    """The same greedy rule with datasketch's MinHash, index and estimate alone."""
    index = MinHashLSH(threshold=threshold, num_perm=128, params=(128 // rows_per_band(threshold), rows_per_band(threshold)))
    sketches, kept = [], []
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=128)
        sketch.update_batch([str(shingle).encode() for shingle in shingles_of(tokens(text)[1]).tolist()])
        near = [other for other in index.query(sketch) if sketches[other].jaccard(sketch) >= threshold]
        kept.append(min(near, default=-1))
        sketches.append(sketch)
        if not near:
            index.insert(number, sketch)
    return kept


def exact_jaccard(one: str, other: str) -> float:
    a, b = (set(shingles_of(tokens(text)[1]).tolist()) for text in (one, other))
    return len(a & b) / len(a | b)


def test_it_agrees_with_datasketch_on_98_percent_of_clear_prompts(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = []
    for seed in range(150):
        base = text_of(seed + 100, rng.randint(60, 160))
        texts += [" ".join(base), " ".join([*base, *rng.choices(WORDS, k=rng.choice([1, 2, 60]))])]
    ours = [index >= 0 for index in repeats(tmp_path, [(text, None) for text in texts])]
    theirs = [index >= 0 for index in by_datasketch(texts, 0.85)]
    assert np.mean(np.array(ours) == np.array(theirs)) >= 0.98
    assert sum(ours) > 50


def test_near_the_threshold_the_exact_similarity_decides(tmp_path: Path) -> None:
    rng = random.Random(1)
    pairs = [(base := text_of(seed + 500), edited(rng, base)) for seed in range(200)]
    prompts = [(" ".join(part), None) for pair in pairs for part in pair]
    found = repeats(tmp_path, prompts)
    checked = 0
    for number in range(0, len(prompts), 2):
        one, other = prompts[number][0], prompts[number + 1][0]
        if len(one.split()) != len(other.split()):  # only pure insertions and deletions are decided by similarity alone
            is_replaced = any(a != b for a, b in zip(one.split(), other.split(), strict=False))
            if exact_jaccard(one, other) < 0.85:
                assert found[number + 1] == -1
            elif is_replaced:
                checked += found[number + 1] == number
    assert checked > 30


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(WORDS[:6]), min_size=1, max_size=12), min_size=1, max_size=12))
def test_a_repeated_prompt_points_to_an_earlier_kept_one(
    texts: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = repeats(tmp_path_factory.mktemp("near"), [(" ".join(text), None) for text in texts])
    for index, earlier in enumerate(found):
        assert earlier < index
        assert earlier == -1 or found[earlier] == -1
        if earlier >= 0:
            assert exact_jaccard(" ".join(texts[index]), " ".join(texts[earlier])) >= 0.85
    assert repeats(tmp_path_factory.mktemp("near"), [(" ".join(text), None) for text in texts]) == found


@given(keys=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_first_occurrences_are_the_first_equal_rows(keys: list[tuple[int, int]]) -> None:
    high, low = (np.array([key[part] for key in keys], dtype=np.uint64) for part in (0, 1))
    assert first_occurrences(high, low).tolist() == [keys.index(key) for key in keys]


def test_bands_find_99_percent_of_pairs_at_the_threshold() -> None:
    assert [rows_per_band(threshold) for threshold in (1.0, 0.85, 0.8, 0.5, 0.2)] == [8, 8, 4, 2, 1]
