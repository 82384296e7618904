"The options of prepare that clean text: what they do to data, and how the loss is told."
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lcm_nb.cli import run_command
from lcm_nb.core.errors import UserError
from lcm_nb.data.batches import open_documents
from lcm_nb.data.prepare import PrepareOptions

TEXTS = ["It rained 🌧️ all day. ----------. Then it stopped.", "Hi! You?", "Go 🏃🏽‍♀️ now. The end came soon."]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    Path("a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))


def prepare(*args):
    "The sentences of each document, and the summary"
    assert run_command(["prepare", "a.jsonl", "--out", "out", "--space", "stand_in_space:space", "--validation", "0", "--test", "0", *args]) == 0
    docs = open_documents("out=train")
    return [docs.text(i) for i in range(len(docs))], json.loads(Path("out/summary.json").read_text())


def test_nothing_is_cleaned_unless_asked(capsys):
    sentences, summary = prepare()
    assert sentences == [["It rained 🌧️ all day.", "----------.", "Then it stopped."], ["Hi!", "You?"], ["Go 🏃🏽‍♀️ now.", "The end came soon."]]
    assert summary["dropped_sentences"] == 0 and "dropped" not in capsys.readouterr().out


def test_poor_sentences_are_dropped_and_counted(capsys):
    sentences, summary = prepare("--min-unique-chars", "3")
    assert sentences[0] == ["It rained 🌧️ all day.", "Then it stopped."]
    assert (summary["dropped_sentences"], summary["concepts"]) == (1, 6)
    assert "1 sentences of emojis alone or too few different characters dropped" in capsys.readouterr().out


def test_a_document_of_poor_sentences_only_is_rejected():
    sentences, summary = prepare("--min-unique-chars", "5")
    assert len(sentences) == 2 and summary["reasons"] == {"text has no sentence": 1}
    assert summary["dropped_sentences"] == 1  # those of rejected documents are not counted again


LISTS = [["It rained 🌧️ all  day.", "🎉", "----------.", "Then  it stopped."], ["Hi! You?", " "], ["The end came soon, and it was " + "very "*60 + "long."]]


def lists(rows=LISTS): Path("a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))


def test_lists_of_sentences_stay_as_they_are_unless_asked():
    lists()
    sentences, summary = prepare()
    assert sentences == [LISTS[0], ["Hi! You?"], LISTS[2]] and summary["dropped_sentences"] == 0


def test_lists_of_sentences_are_cleaned_but_not_cut():
    lists()
    sentences, summary = prepare("--remove-emojis", "True", "--min-unique-chars", "3")
    assert sentences == [["It rained all day.", "Then  it stopped."], ["Hi! You?"], LISTS[2]]
    assert summary["dropped_sentences"] == 2


def test_lists_of_sentences_need_no_model(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lists()
    assert prepare("--preset", "reference")[0][1] == ["Hi! You?"]


def test_sentences_of_emojis_alone_are_counted():
    lists(["It rained. 🎉\n\n😀😀\n\nThe end.", ["One.", "👍🏿"], ["Two."], "Three."])
    sentences, summary = prepare("--remove-emojis", "True")
    assert sentences == [["It rained.", "The end."], ["One."], ["Two."], ["Three."]]
    assert summary["dropped_sentences"] == 3


def test_a_list_of_emojis_alone_is_rejected():
    lists([["🎉", "😀"], ["One."], ["Two."]])
    assert prepare("--remove-emojis", "True")[1]["reasons"] == {"text has no sentence": 1}


def test_texts_beside_lists_are_kept_as_a_column():
    lists([["One."], "Two. Three."])
    assert prepare()[0] == [["One."], ["Two.", "Three."]]
    assert pq.read_table("out/split=train/part-00000.parquet", partitioning=None)["text"].to_pylist() == ['["One."]', "Two. Three."]


def test_a_method_that_there_is_not_is_told_before_the_work(capsys):
    lists()
    assert run_command(["prepare", "a.jsonl", "--out", "out", "--space", "stand_in_space:space", "--segmentation", "sentencx"]) == 2
    assert 'Did you mean "sentencex"' in capsys.readouterr().err and not Path("out").exists()


def test_the_reference_preset_by_rules():
    sentences, _ = prepare("--preset", "reference", "--segmentation", "sentencex")
    assert sentences == [["It rained all day.", "----------.", "Then it stopped."], ["Hi! You?"], ["Go now.", "The end came soon."]]


def test_what_is_given_goes_before_the_preset():
    options = PrepareOptions("x", "y", preset="reference", max_chars=200, remove_emojis=False)
    assert (options.segmentation, options.max_chars, options.remove_emojis, options.keep_whole, options.threshold) == ("sat-3l", 200, False, 10, 0.2)
    with pytest.raises(UserError, match='preset of segmentation "refrence".*Did you mean "reference"'): PrepareOptions("x", "y", preset="refrence")


@pytest.mark.parametrize("option, value", [("--keep-whole", "20"), ("--remove-emojis", "True"), ("--min-unique-chars", "3"), ("--threshold", "0.5"), ("--segmentation", "sat-3l"), ("--segment-device", "cpu")])
def test_another_cleaning_is_another_result(option, value, capsys):
    prepare()
    assert run_command(["prepare", "a.jsonl", "--out", "out", "--space", "stand_in_space:space", "--validation", "0", "--test", "0", option, value]) == 2
    assert f"now {option[2:].replace('-', '_')}=" in capsys.readouterr().err


def test_the_same_settings_by_preset_or_one_by_one_are_the_same_work():
    prepare("--preset", "reference", "--segmentation", "sentencex")
    assert prepare("--segmentation", "sentencex", "--max-chars", "256", "--remove-emojis", "True", "--keep-whole", "10")


def test_a_missing_sat_model_ends_in_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run_command(["prepare", "a.jsonl", "--out", "out", "--space", "stand_in_space:space", "--preset", "reference", "--no-progress"]) == 2
    said = capsys.readouterr().err
    assert "segment-any-text/sat-3l" in said and said.strip().count("\n") == 0
    assert not any(not p.name.startswith(".") for p in Path("out").iterdir())
