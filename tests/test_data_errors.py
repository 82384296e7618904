"What is wrong with data is said in one sentence with exit code 2, and nothing half-written stays behind."
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lcm_nb.cli import run_command
from lcm_nb.core.errors import UserError
from lcm_nb.data.batches import BatchOptions, Mixture, open_documents
from lcm_nb.data.cards import DataCard, concept_column, find_card, write_concepts

ROOT = Path(__file__).resolve().parents[1]
GOOD = "".join(json.dumps({"id": f"d{i}", "text": f"Tom has {i} hens. He feeds them."}) + "\n" for i in range(30))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    "Each test in an empty folder, with the stand-in space at hand"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.delenv("LCM_NB_CARDS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def prepare(*args): return run_command(["prepare", *map(str, args), "--out", "out", "--space", "stand_in_space:space", "--no-progress"])


@pytest.mark.parametrize("name, content, args, says", [
    ("good.jsonl", GOOD, ["missing.jsonl"], "There is no file missing.jsonl"),
    ("good.jsonl", GOOD, ["god.jsonl"], 'Did you mean "good.jsonl"'),
    ("good.jsonl", GOOD, ["good.jsonl", "--text-column", "txt"], 'has no column txt. Did you mean "text"'),
    ("good.jsonl", GOOD, ["good.jsonl", "--lang-column", "language"], "has no column language"),
    ("good.jsonl", GOOD, ["good.jsonl", "--lang", "deu_Latn"], "has no language deu_Latn"),
    ("good.jsonl", GOOD, ["good.jsonl", "--lang", "xx"], 'There is no language "xx"'),
    ("good.jsonl", GOOD, ["good.jsonl", "--dtype", "int8"], "dtype is"),
    ("good.csv", "id,text\n", ["good.csv"], "There is no document in good.csv"),
    ("empty.jsonl", "", ["empty.jsonl"], "There is no document in empty.jsonl"),
    ("empty.txt", "", ["empty.txt", "--document", "block"], "There is no document in empty.txt"),
    ("a.txt", "One. Two.\n", ["a.txt"], "say what one document is"),
    ("a.txt", "One. Two.\n", ["a.txt", "--document", "line"], "it must be"),
    ("a.txt", "Café.\n".encode("latin-1"), ["a.txt", "--document", "file"], "a.txt is not UTF-8 text (byte 3)"),
    ("a.txt", "One.\n".encode("utf-16"), ["a.txt", "--document", "file"], "a.txt is not UTF-8 text (byte 0)"),
    ("a.pdf", b"%PDF", ["a.pdf"], "a.pdf ends in .pdf"),
    ("a.parquet", b"no", ["a.parquet"], "a.parquet is not a parquet file"),
    ("bad.jsonl", GOOD[:200] + "{\n" * 20, ["bad.jsonl"], "more than half; the first is bad.jsonl:"),
    ("odd.jsonl", GOOD.replace("feeds", "xyzzy"), ["odd.jsonl"], "more than half; the first is odd.jsonl:1: the space stand-in@1 cannot represent"),
])
def test_prepare(name, content, args, says, capsys):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert prepare(*args) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not Path("out").exists() or not any(not p.name.startswith(".") for p in Path("out").iterdir())


def test_one_bad_document_stops_nothing():
    lines = GOOD.splitlines()
    lines[3:3] = ["{", '{"text": null}', '{"text": "  "}', '{"text": "Say xyzzy."}', '{"text": "\\ud83d"}', '{"other": 1}']
    Path("mixed.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    assert prepare("mixed.jsonl", "--card-folder", "data_cards") == 0
    rejected = [json.loads(line) for line in Path("out/rejected.jsonl").open()]
    assert [r["place"].split(":")[1] for r in rejected] == ["4", "5", "6", "7", "8", "9", "37"]
    assert [r["reason"].split(" (")[0] for r in rejected] == ["not valid JSON", "text is null", "text has no sentence", 'the space stand-in@1 cannot represent "Say xyzzy."',
        "not a JSON object of whole characters", "text is missing", "not UTF-8 text"]
    summary = json.loads(Path("out/summary.json").read_text())
    assert (summary["documents_read"], summary["documents"], summary["rejected"]) == (37, 30, 7)
    assert find_card("out")[0].counts["train"]["documents"] == summary["splits"]["train"]["documents"]
    docs = open_documents("out")  # the name of the card, found in ./data_cards
    assert len(docs) == 30 and docs.text(0)[1] == "He feeds them."


def test_changed_input_or_option_is_refused_and_changes_nothing(capsys):
    Path("good.jsonl").write_text(GOOD)
    assert prepare("good.jsonl") == 0
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    assert prepare("good.jsonl", "--shard", "7") == 2
    assert "out was begun with shard=1000, now shard=7; give another out folder" in capsys.readouterr().err
    Path("good.jsonl").write_text(GOOD + '{"text": "More."}\n')
    assert prepare("good.jsonl") == 2
    assert "another content of good.jsonl" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}


def test_a_failed_start_can_be_mended_in_place():
    Path("odd.jsonl").write_text(GOOD.replace("feeds", "xyzzy"))
    assert prepare("odd.jsonl") == 2
    Path("odd.jsonl").write_text(GOOD)
    assert prepare("odd.jsonl") == 0


def test_a_foreign_folder_is_left_alone(capsys):
    Path("good.jsonl").write_text(GOOD)
    Path("out").mkdir()
    Path("out/diary.txt").write_text("Dear diary")
    assert prepare("good.jsonl") == 2
    assert "out holds something else (diary.txt)" in capsys.readouterr().err


def test_a_damaged_shard_is_made_again():
    Path("good.jsonl").write_text(GOOD)
    assert prepare("good.jsonl") == 0
    shard = next(Path("out").rglob("*.parquet"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    assert prepare("good.jsonl") == 0
    assert shard.read_bytes() == whole


def test_inputs_of_every_kind_give_the_same_sentences():
    texts = ["It rained.\nAll day long.", "The sun, at last, came."]
    Path("a.txt").write_text("\n\n\n".join(texts))
    Path("a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    Path("a.csv").write_text("text,n\n" + "".join(f'"{t}",{i}\n' for i, t in enumerate(texts)))
    Path("lists.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in [["It rained.", "All day long."], texts[1:]]))
    pq.write_table(__import__("pyarrow").table({"text": texts}), "a.parquet")
    for name, more in [("a.txt", ["--document", "block"]), ("a.jsonl", []), ("a.csv", []), ("a.parquet", []), ("lists.jsonl", [])]:
        assert run_command(["prepare", name, "--out", f"o-{name}", "--space", "stand_in_space:space", "--no-progress", "--validation", "0", "--test", "0", *more]) == 0
        docs = open_documents(f"o-{name}=train")
        assert [docs.text(i) for i in range(2)] == [["It rained.", "All day long."], ["The sun, at last, came."]]


def test_supervised_pairs():
    Path("qa.jsonl").write_text("".join(json.dumps({"q": f"What is {i}? Tell me.", "a": f"It is {i}.", "part": "train" if i else "test"}) + "\n" for i in range(4)))
    assert prepare("qa.jsonl", "--text-column", "q", "--target-text-column", "a", "--split-column", "part", "--name", "qa") == 0
    docs = open_documents("out=train")
    assert (len(docs), docs.text(0), docs.target_text(0), docs.target(0).shape) == (3, ["What is 1?", "Tell me."], ["It is 1."], (1, 16))
    b = Mixture("out=train", BatchOptions(batch_size=3, source_suffix_text="End of text.")).batch(0)
    assert (b.lengths.tolist(), b.source_lengths.tolist()) == ([4] * 3, [3] * 3)


def card(name, dim=4, space="x@1", **kw):
    write_concepts(Path(name) / "all.parquet", {"text_sentences_sonar_emb": concept_column([np.ones((3, dim))] * 4)}, space=space, dim=dim)
    return DataCard(name, name, source_text_column=None, **kw)


@pytest.mark.parametrize("call, says", [
    (lambda: find_card("nothing"), 'There is no data card or folder "nothing"; looked in data_cards'),
    (lambda: Mixture([card("a"), card("b", dim=5)], BatchOptions(batch_size=1)), "more than one dim"),
    (lambda: Mixture([card("a"), card("b", space="y@1")], BatchOptions(batch_size=1)), "more than one space: a has x@1, b has y@1"),
    (lambda: open_documents(DataCard("a", card("a").parquet_path, space="z@1")), "more than one space"),
    (lambda: open_documents(DataCard("a", card("a").parquet_path, source_column="text_emb")), "has no column text_emb"),
    (lambda: open_documents(card("a", filters=[["lang", "==", "x"]])), "has no column lang"),
    (lambda: open_documents("a=test") if card("a") else None, 'There is no split "test"'),
    (lambda: BatchOptions(), "Give one of batch_size (rows) and max_tokens"),
    (lambda: Mixture(card("a"), BatchOptions(batch_size=1, min_length=9)), "No document of a has between 9"),
    (lambda: Mixture(card("a", space=""), BatchOptions(batch_size=1, source_suffix_text="End of text.")), "does not say its space"),
])
def test_cards_and_batches(call, says):
    with pytest.raises(UserError) as e: call()
    assert says in str(e.value) and "\n" not in str(e.value)


def test_sample_cards_are_cards():
    from lcm_nb.data.cards import load_cards
    names = [c.name for f in sorted((ROOT / "data_cards").glob("*.yaml")) for c in load_cards(f)]
    assert names and len(set(names)) == len(names)


def test_prepare_options_import_no_torch():
    code = "import sys, lcm_nb.data.prepare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
