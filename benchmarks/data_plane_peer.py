"""datatrove's filters on rows of ``data_plane.py``; run by it with the Python of datatrove's own environment.

    python data_plane_peer.py ROWS.jsonl ITEMS.jsonl WORK_FOLDER

Each filter sees all rows by itself, with its default settings, in one process; reading and writing files is not timed. The
index of evaluation n-grams is written as its indexer writes it, from given items instead of lighteval's tasks.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.dedup.minhash import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import GopherRepetitionFilter
from datatrove.utils.text import ngrams, simplify_text


def main() -> None:
    rows, items, folder = (Path(given) for given in sys.argv[1:])
    texts = [(row["id"], row["text"]) for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines())]
    evaluation = [json.loads(line)["text"] for line in items.read_text(encoding="utf-8").splitlines()]
    warm_up = [Document(text=texts[0][1], id="warm")]
    result = {}
    repetition = GopherRepetitionFilter()
    decontamination = contamination_filter(evaluation, folder / "index")
    for name, step in (("repetition", repetition), ("contaminated", decontamination)):
        step.filter(warm_up[0])
        started = time.process_time()
        removed = [row for row, text in texts if step.filter(Document(text=text, id=row)) is not True]
        result[name] = {"seconds": time.process_time() - started, "removed": removed}
    started = time.process_time()
    kept = kept_by_minhash(texts, folder / "minhash")
    result["near_duplicate"] = {
        "seconds": time.process_time() - started, "removed": [row for row, _ in texts if row not in kept]
    }  # fmt: skip
    print(json.dumps(result))


def contamination_filter(evaluation: list[str], folder: Path) -> NGramsDecontFilter:
    folder.mkdir(parents=True)
    config = NGramsDecontConfig()
    step = NGramsDecontFilter(str(folder), config)
    hashes = {
        step.hash_func(" ".join(gram))
        for text in evaluation
        for gram in ngrams(step.tokenizer.word_tokenize(simplify_text(text, config.norm_config)), config.n_grams)
    }
    np.array(list(hashes), dtype=config.hash_config.np_descr).tofile(folder / "made.index.hashes")
    return step


def kept_by_minhash(texts: list[tuple[str, str]], folder: Path) -> set[str]:
    def documents():
        return (Document(text=text, id=row) for row, text in texts)

    signatures, buckets, removed = (str(folder / name) for name in ("signatures", "buckets", "removed"))
    signing = MinhashDedupSignature(signatures)
    signing.run(documents())
    for rank in range(signing.config.num_buckets):
        MinhashDedupBuckets(signatures, buckets).run(rank=rank, world_size=signing.config.num_buckets)
    MinhashDedupCluster(buckets, removed).run()
    return {document.id for document in MinhashDedupFilter(removed).run(documents())}


if __name__ == "__main__":
    main()
