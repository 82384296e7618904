"""Batches against those that the reference implementation made of the same documents.

Every concept of the recording has an identity (document, index), which here is the vector itself, so a batch can be read back
as runs of documents. The reference merges row groups into tables and never lets a batch cross two tables, which only makes
smaller batches at their ends; a table is given here as a data set of its own. What the project does otherwise on purpose is
skipped, with the reason.
"""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lcm_nb.core.errors import UserError
from lcm_nb.data import batches
from lcm_nb.data.batches import BatchOptions, Mixture, cut_batches
from lcm_nb.data.cards import DataCard, concept_column, write_concepts

GOLDEN = Path(os.environ.get("LCM_GOLDEN", Path(__file__).parent / "fixtures" / "golden")) / "data_batching.json"
RECORDED = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else None
CASES = RECORDED["scalars"]["cases"] if RECORDED else {}
SPLITS = RECORDED["scalars"]["compute_length_splits"] if RECORDED else {}
if RECORDED is None: pytestmark = pytest.mark.skip(reason=f"{GOLDEN} is not there")

OPTIONS = {"batch_size": "batch_size", "max_tokens": "max_tokens", "len_to_wrap_long_seq": "wrap", "packing": "packing",
           "order_by_length": "order_by_length", "min_length_of_sequences": "min_length", "shuffle": "shuffle"}
OTHERWISE = {
    "wrap_before_affixing": "the mark of the end is not put behind pieces that are not the end",
    "min_length_of_sequences_after_batching": "short rows go before batches are made (min_row), so that batches stay full",
    "min_batch_size": "small batches are not lost",
    "nb_epochs": "a pass ends with its last batch; no batch holds documents of two passes",
    "max_iteration_steps": "the training loop counts steps",
    "even_sharding": "processes share the rows of one global batch",
    "multiple_dataset_chaining": "data sets are mixed by weight, and none loses its rest",
}


def skipped(case):
    "Why a recorded case is not asked of this project; None if it is"
    loading = case["loading"]
    if loading.get("max_tokens") and loading.get("order_by_length") is False: return "without ordering the reference closes some batches early"
    if "rank" in case: return OTHERWISE["even_sharding"]
    if "limit" in case.get("dataset", {}): return "limits are the card's filters here"
    unknown = set(loading) - set(OPTIONS) - {"seed"}
    return next((OTHERWISE.get(k, f"no option {k} here") for k in sorted(unknown)), None)


def vectors(doc, length): return np.stack([np.full(length, doc), np.arange(length)], 1).astype("float32")


def tables(case):
    "Documents (id, source length, target length or 0) as the reference merges their row groups"
    config, loading = RECORDED["config"], case["loading"]
    lengths, size = config["document_lengths"], config["row_group_size"]
    targets = config["supervised_target_lengths"] if supervised(case) else [0] * len(lengths)
    documents = list(zip(range(len(lengths)), lengths, targets))
    groups = [documents[i:i + size] for i in range(0, len(documents), size)]
    count = lambda group: sum(s + t for _, s, t in group)
    enough = 4 * loading.get("max_tokens", 0) or 4 * loading.get("len_to_wrap_long_seq", 0) * loading.get("batch_size", 0) or 1.5 * count(documents) / len(groups)
    merged, waiting, n = [], [], 0
    for group in groups:
        waiting, n = waiting + group, n + 1
        if n >= config["loader_defaults_here"]["nb_parallel_fragments"] and count(waiting) >= enough: merged, waiting, n = [*merged, waiting], [], 0
    return [*merged, waiting] if waiting else merged


def supervised(case): return isinstance(case["batches"], str) and "suppervised" in case["batches"] or "targets" in case["batches"][0]


def data_card(documents, folder, case):
    columns = {"source": concept_column([vectors(d, s) for d, s, _ in documents])}
    if supervised(case): columns["target"] = concept_column([vectors(1000 + d, t) for d, _, t in documents])
    write_concepts(folder / "all.parquet", columns, space="recorded@1", dim=2)
    return DataCard("recorded", str(folder), "source", None, target_column="target" if supervised(case) else None)


def options(case):
    kw = {"shuffle": False} | {OPTIONS[k]: v for k, v in case["loading"].items() if k in OPTIONS}
    if "max_tokens" in kw and "wrap" not in kw: kw["max_length"] = kw["max_tokens"]  # the reference drops longer documents
    return BatchOptions(**kw, **case.get("dataset", {}))


def runs(sequence):
    "[document, first, last + 1] of a sequence of identities"
    out = []
    for doc, i in sequence.int().tolist():
        if out and out[-1][0] == doc and out[-1][2] == i: out[-1][2] += 1
        else: out.append([doc, i, i + 1])
    return out


def in_words(batch):
    "A batch as the recording writes it"
    rows = [c[:n] for c, n in zip(batch.concepts, batch.lengths)]
    if batch.source_lengths is None: return {"sequences": [runs(r) for r in rows], "lengths": batch.lengths.tolist()}
    cut = [(r[:s], r[s:]) for r, s in zip(rows, batch.source_lengths)]
    return {"sequences": [runs(s) for s, _ in cut], "lengths": [len(s) for s, _ in cut],
            "targets": [runs(t) for _, t in cut], "target_lengths": [len(t) for _, t in cut]}


@pytest.fixture
def made(tmp_path, monkeypatch):
    "A function that gives our batches for a recorded case"
    ids = RECORDED["config"]["affix_ids"]
    monkeypatch.setattr(batches, "affix_concepts", lambda text, *_: torch.tensor([[float(i), 0.] for i in ids[text]]))

    def make(case):
        out = []
        for k, documents in enumerate(tables(case)):
            mixture = Mixture(data_card(documents, tmp_path / str(k), case), options(case), seed=case["loading"].get("seed", 0))
            out += [mixture.batch(i) for i in range(len(mixture.streams[0].pass_(0)))]
        return out
    return make


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not isinstance(c["batches"], str)])
def test_batches(name, made):
    case = CASES[name]
    if why := skipped(case): pytest.skip(why)
    ours, theirs = [in_words(b) for b in made(case)], [{k: b[k] for k in in_words_keys(b)} for b in case["batches"]]
    if case["loading"].get("shuffle"): ours, theirs = in_any_order(ours), in_any_order(theirs)
    assert [b["lengths"] for b in ours] == [b["lengths"] for b in theirs]
    if "max_tokens" in case["loading"]:  # which of several documents of one length comes first is not fixed
        every = lambda bs: sorted(zip((s for b in bs for s in b["sequences"]), (t for b in bs for t in b.get("targets", b["sequences"]))))
        assert every(ours) == every(theirs)
    else: assert ours == theirs


def in_words_keys(batch): return [k for k in ("sequences", "lengths", "targets", "target_lengths") if k in batch]
def in_any_order(words): return sorted(words, key=lambda b: (b["lengths"], b["sequences"]))


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if "doc_lengths" in c["batches"][0]])
def test_packed_documents_are_marked(name, made):
    for ours, theirs in zip(made(CASES[name]), CASES[name]["batches"], strict=True):
        counts = [[int((row == i).sum()) for i in range(int(row.max()) + 1)] for row in ours.segments]
        assert counts == theirs["doc_lengths"]


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if isinstance(c["batches"], str)])
def test_refused(name, made):
    with pytest.raises(UserError): made(CASES[name])


@pytest.mark.parametrize("name", SPLITS)
def test_budgets(name):
    budget, ordered, drop = (int("".join(filter(str.isdigit, part))) for part in name.split("_"))
    if not ordered: pytest.skip(skipped({"loading": {"max_tokens": budget, "order_by_length": False}}))
    lengths = np.sort([n for n in RECORDED["config"]["document_lengths"] if n <= budget or not drop])
    cuts = cut_batches(lengths, max_tokens=budget)
    theirs = [[RECORDED["config"]["document_lengths"][d] for d in batch] for batch in SPLITS[name]]
    assert [lengths[a:b].tolist() for a, b in zip(cuts, cuts[1:])] == theirs
