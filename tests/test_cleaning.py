"The options of prepare that clean text: what they do to data, and how the loss is told."
import json
from pathlib import Path

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
    assert "1 sentences of too few different characters dropped" in capsys.readouterr().out


def test_a_document_of_poor_sentences_only_is_rejected():
    sentences, summary = prepare("--min-unique-chars", "5")
    assert len(sentences) == 2 and summary["reasons"] == {"text has no sentence": 1}
    assert summary["dropped_sentences"] == 1  # those of rejected documents are not counted again


def test_the_reference_preset_by_rules():
    sentences, _ = prepare("--preset", "reference", "--segmentation", "sentencex")
    assert sentences == [["It rained all day.", "----------.", "Then it stopped."], ["Hi! You?"], ["Go now.", "The end came soon."]]


def test_what_is_given_goes_before_the_preset():
    options = PrepareOptions("x", "y", preset="reference", max_chars=200, remove_emojis=False)
    assert (options.segmentation, options.max_chars, options.remove_emojis, options.keep_whole, options.threshold) == ("sat-3l", 200, False, 10, 0.2)
    with pytest.raises(UserError, match='preset of segmentation "refrence".*Did you mean "reference"'): PrepareOptions("x", "y", preset="refrence")


@pytest.mark.parametrize("option, value", [("--keep-whole", "20"), ("--remove-emojis", "True"), ("--min-unique-chars", "3"), ("--threshold", "0.5"), ("--segmentation", "sat-3l")])
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
