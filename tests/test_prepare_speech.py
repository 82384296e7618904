"prepare with recordings: every form they come in, what is broken, and going on after an interruption."
import hashlib
import json
import sys
import types
import wave
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lcm_nb.cli import run_command
from lcm_nb.core.errors import RecordingError, UserError
from lcm_nb.data.batches import BatchOptions, Mixture, open_documents
from lcm_nb.data.cards import file_metadata, find_card
from lcm_nb.data.prepare import Document, PrepareOptions, Recording, hear
from lcm_nb.data.prepare import prepare as run

RATE = 8000


class Ear:
    "A space that hears: how loud a recording is in 16 bands of frequency"
    id, dim, languages, license, speech_languages = "ear@1", 16, ["eng_Latn", "fra_Latn"], "MIT", ["eng_Latn", "deu_Latn"]
    calls, gives_up = 0, 0  # so many calls of encode_speech, then somebody presses Ctrl-C

    def encode(self, texts, lang, progress=False): return torch.zeros(len(texts), self.dim)

    def coverage(self, texts, lang): return [True]*len(texts)

    def decode(self, concepts, lang): return ["?"]*len(concepts)

    def spectrum(self, audio):
        if isinstance(audio, str):
            try:
                with wave.open(audio) as f: audio = np.frombuffer(f.readframes(f.getnframes()), "<i2")/32768, f.getframerate()
            except (wave.Error, EOFError) as e: raise RecordingError(f"{Path(audio).resolve()} cannot be read as audio: {e}") from None  # as the real one
        x, rate = audio
        loud = np.abs(np.fft.rfft(np.asarray(x)[:800]*np.hanning(800)))[:400].reshape(16, 25).sum(1)
        return (loud/np.linalg.norm(loud)).astype("float32")

    def encode_speech(self, audio, lang, progress=False):
        Ear.calls += 1
        if Ear.gives_up and Ear.calls % Ear.gives_up == 0: raise KeyboardInterrupt
        return torch.tensor(np.array([self.spectrum(a) for a in audio]))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Ear, "calls", 0)
    monkeypatch.setattr(Ear, "gives_up", 0)
    monkeypatch.setitem(sys.modules, "ear", types.SimpleNamespace(space=Ear))
    Path("data/wav").mkdir(parents=True)
    for hertz in (200, 500, 900, 1500): Path(f"data/wav/{hertz}.wav").write_bytes(tone_file(hertz))


def tone(hertz): return (20000*np.sin(2*np.pi*hertz*np.arange(RATE//5)/RATE)).astype("<i2")


def tone_file(hertz):
    from io import BytesIO
    f = BytesIO()
    with wave.open(f, "wb") as w:
        w.setnchannels(1)
        w.setsampwidth(2)
        w.setframerate(RATE)
        w.writeframes(tone(hertz).tobytes())
    return f.getvalue()


def heard(*hertz): return np.array([Ear().spectrum((tone(h)/32768, RATE)) for h in hertz])


def jsonl(rows, name="data/a.jsonl"):
    Path(name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return name


def prepare(source, out="out", **how):
    how = dict(speech_column="audio", space="ear:space", validation=0, test=0, dtype="float32", progress=False) | how
    return run(PrepareOptions(source, out, **how))


def checksums(folder): return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(Path(folder).rglob("*")) if f.is_file()}


def test_paths_relative_to_the_input_and_lists_of_them():
    source = jsonl([{"id": "a", "audio": ["wav/200.wav", "wav/500.wav"], "text": ["Low.", "Higher."]}, {"id": "b", "audio": str(Path("data/wav/900.wav").resolve()), "text": "High."},
                    {"id": "c", "audio": ["wav/1500.wav", "wav/200.wav"], "text": "Both."}, {"id": "d", "audio": ["wav/200.wav"]}])
    summary = prepare(source)
    assert (summary["documents"], summary["concepts"], summary["rejected"]) == (4, 6, 0)
    docs = open_documents("out=train")
    assert [docs.text(i) for i in range(4)] == [["Low.", "Higher."], ["High."], ["1500.wav", "200.wav"], ["200.wav"]]
    np.testing.assert_allclose(docs[0], heard(200, 500), atol=1e-6)
    np.testing.assert_allclose(docs[2], heard(1500, 200), atol=1e-6)
    assert Mixture("out=train", BatchOptions(batch_size=4)).batch(0).concepts.shape == (4, 2, 16)


def test_card_and_file_say_what_they_would_of_text():
    prepare(jsonl([{"audio": "wav/200.wav"}]), lang="de", name="tones")
    card = find_card("out")[0]
    assert (card.source_column, card.source_text_column, card.lang, card.space) == ("text_sentences_sonar_emb", "text_sentences", "deu_Latn", "ear@1")
    schema = pq.read_schema("out/split=train/part-00000.parquet")
    assert file_metadata(schema)["lang"] == "deu_Latn"
    assert schema.names == ["id", "audio", "text_sentences", "text_sentences_sonar_emb"]


def test_decoded_audio_in_jsonl():
    prepare(jsonl([{"audio": {"array": (tone(500)/32768).tolist(), "sampling_rate": RATE}}, {"audio": {"path": "wav/200.wav", "bytes": None}}]))
    docs = open_documents("out=train")
    assert [docs.text(i) for i in range(2)] == [["audio 1"], ["200.wav"]]
    np.testing.assert_allclose(docs[0], heard(500), atol=1e-5)


def test_parquet_as_hugging_face_writes_it():
    audio = [{"bytes": tone_file(h), "path": f"{h}.wav"} for h in (200, 900)] + [{"bytes": None, "path": "wav/1500.wav"}]
    pq.write_table(pa.table({"audio": audio, "text": ["Low.", "High.", None], "speaker": [1, 2, 3]}), "data/a.parquet")
    prepare("data/a.parquet")
    table = pq.read_table("out/split=train/part-00000.parquet", partitioning=None)
    assert table["text_sentences"].to_pylist() == [["Low."], ["High."], ["1500.wav"]]
    assert table["audio"].to_pylist() == [["200.wav"], ["900.wav"], ["1500.wav"]]  # names, not the sound again
    assert table["speaker"].to_pylist() == [1, 2, 3]
    np.testing.assert_allclose(np.concatenate([open_documents("out=train")[i] for i in range(3)]), heard(200, 900, 1500), atol=1e-6)


@pytest.mark.parametrize("several", [False, True])
def test_hugging_face_data_set_with_an_audio_feature(several):
    one = lambda h: {"bytes": tone_file(h), "path": f"{h}.wav"}
    feature = datasets.Audio(sampling_rate=RATE)
    features = datasets.Features({"audio": datasets.List(feature) if several else feature, "text": datasets.List(datasets.Value("string")) if several else datasets.Value("string")})
    rows = {"audio": [[one(200), one(500)], [one(900)]], "text": [["Low.", "Higher."], ["High."]]} if several else {"audio": [one(200), one(900)], "text": ["Low.", "High."]}
    stored = datasets.table.InMemoryTable(pa.table(rows, schema=features.arrow_schema))  # from_dict would want torchcodec
    datasets.Dataset(stored, info=datasets.DatasetInfo(features=features)).save_to_disk("data/hub")
    summary = prepare("hf:data/hub")
    docs = open_documents("out=train")
    assert [docs.text(i) for i in range(2)] == ([["Low.", "Higher."], ["High."]] if several else [["Low."], ["High."]])
    assert summary["concepts"] == (3 if several else 2)
    np.testing.assert_allclose(docs[1], heard(900), atol=1e-6)


def test_broken_recordings_reject_their_document_alone():
    Path("data/wav/broken.wav").write_bytes(b"RIFF is all there is")
    good = [{"audio": ["wav/200.wav", "wav/500.wav"]} for _ in range(20)]
    bad = [{"audio": ["wav/200.wav", "wav/broken.wav"]}, {"audio": "wav/none.wav"}, {"audio": None}, {"audio": []}, {"audio": [3]}, {"audio": ["wav/200.wav"], "text": ["a", "b"]},
           {"audio": {"array": [[0, 1]], "sampling_rate": 8000}}, {"audio": {"array": [0, 1]}}]
    summary = prepare(jsonl(good[:10] + bad + good[10:]))
    assert (summary["documents"], summary["concepts"], summary["rejected"]) == (20, 40, 8)
    reasons = [r["reason"] for r in map(json.loads, Path("out/rejected.jsonl").open())]
    wanted = ["broken.wav cannot be read as audio", "there is no file wav/none.wav", "audio is null", "audio has no recording", "audio 1 is neither a path", "there are 2 transcripts for 1 recordings",
              "it must be one channel", "its sampling_rate"]
    assert all(w in r for w, r in zip(wanted, reasons)), reasons
    np.testing.assert_allclose(open_documents("out=train")[19], heard(200, 500), atol=1e-6)


def test_interrupted_and_run_again_gives_the_same_bytes():
    Path("data/wav/broken.wav").write_bytes(b"")
    rows = [{"audio": ["wav/200.wav", "wav/900.wav"][:1 + i % 2], "text": ["One.", "Two."][:1 + i % 2]} for i in range(30)]
    rows[4], rows[9] = {"audio": ["wav/broken.wav"]}, {"audio": ["wav/none.wav"]}
    source = jsonl(rows)
    prepare(source, "whole/tones", shard=4, validation=.2)
    Ear.gives_up, Ear.calls, stopped = 6, 0, 0
    while stopped < 20:
        try: prepare(source, "again/tones", shard=4, validation=.2); break
        except KeyboardInterrupt: stopped += 1
        assert not Path("again/tones/card.yaml").exists()
    assert stopped >= 2
    assert checksums("again/tones") == checksums("whole/tones")


def test_a_file_that_comes_later_does_not_shift_the_shards():
    source = jsonl([{"id": f"d{i}", "audio": f"wav/{h}.wav"} for i, h in enumerate([200, 77, 500, 900, 1500])])
    Ear.gives_up = 2
    with pytest.raises(KeyboardInterrupt): prepare(source, shard=2)
    Path("data/wav/77.wav").write_bytes(tone_file(77))
    Ear.gives_up = 0
    prepare(source, shard=2)
    ids = [i for f in sorted(Path("out").rglob("*.parquet")) for i in pq.read_table(f, columns=["id"], partitioning=None)["id"].to_pylist()]
    assert ids == ["d0", "d2", "d3", "d4"]


def test_a_broken_recording_among_bytes_goes_by_its_name():
    pq.write_table(pa.table({"audio": [{"bytes": b"RIFF", "path": "b.wav"}] + [{"bytes": tone_file(200), "path": "a.wav"}]*3}), "data/a.parquet")
    prepare("data/a.parquet")
    assert json.loads(Path("out/rejected.jsonl").read_text())["reason"].startswith("b.wav cannot be read as audio")


def test_spoken_questions_and_written_answers():
    prepare(jsonl([{"audio": "wav/200.wav", "answer": "It is low. Very low."}]), target_text_column="answer")
    docs = open_documents("out=train")
    assert (docs.text(0), docs.target_text(0), docs.target(0).shape) == (["200.wav"], ["It is low.", "Very low."], (2, 16))


@pytest.mark.parametrize("args, says", [
    (["--speech-column", "sound"], 'has no column sound'),
    (["--speech-column", "audio", "--text-column", "words"], "has no column words"),
    (["--speech-column", "audio", "--lang", "fra_Latn"], "The space ear@1 hears no language fra_Latn"),
    (["--speech-column", "audio", "--space", "stand_in_space:space"], "hears no speech"),
])
def test_errors_before_the_work(args, says, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    source = jsonl([{"audio": "wav/200.wav"}])
    space = [] if "--space" in args else ["--space", "ear:space"]
    assert run_command(["prepare", source, "--out", "out", "--no-progress", *space, *args]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_languages_by_column():
    summary = prepare(jsonl([{"audio": "wav/200.wav", "l": "en"}, {"audio": "wav/500.wav", "l": "de"}, {"audio": "wav/900.wav", "l": "fr"}]), lang_column="l")
    assert (summary["documents"], summary["reasons"]) == (2, {"the space hears no fra_Latn": 1})


def test_languages_of_questions_that_are_heard_and_answers_that_are_read():
    rows = [{"audio": f"wav/{h}.wav", "answer": "Yes.", "l": l} for h, l in [(200, "en"), (500, "fr"), (900, "de"), (1500, "en")]]
    summary = prepare(jsonl(rows), lang_column="l", target_text_column="answer")
    assert (summary["documents"], summary["reasons"]) == (2, {"the space hears no fra_Latn": 1, "the space has no deu_Latn": 1})


@pytest.mark.parametrize("column", [None, "l"])
def test_a_space_that_is_not_made_to_hear(column, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with pytest.raises(UserError, match="The space stand-in@1 hears no speech; use one that does"):
        prepare(jsonl([{"audio": "wav/200.wav", "l": "en"}]), space="stand_in_space:space", lang_column=column)
    assert not Path("out").exists()


@pytest.mark.parametrize("text", [[3], [["A."]], 3, {"a": 1}, [{"a": 1}]])
def test_a_transcript_that_is_no_text_rejects_its_document_alone(text):
    rows = [{"audio": "wav/200.wav", "text": t} for t in ("Low.", text, [None], None)]
    summary = prepare(jsonl(rows))
    assert (summary["documents"], summary["reasons"]) == (3, {"text is neither text nor a list of transcripts": 1})
    assert [open_documents("out=train").text(i) for i in range(3)] == [["Low."], ["200.wav"], ["200.wav"]]


@pytest.mark.parametrize("audio", ["UklGRg"*1000, "wav/\0.wav", "", ".", {"array": [0, 1], "sampling_rate": float("inf")}, {"array": [10**400], "sampling_rate": 8000}, {"bytes": "UklGRg"}])
def test_strange_recordings_reject_their_document_alone(audio):
    summary = prepare(jsonl([{"audio": a} for a in ("wav/200.wav", audio, ["wav/500.wav"])]))
    assert (summary["documents"], summary["rejected"]) == (2, 1)
    assert len(json.loads(Path("out/rejected.jsonl").read_text())["reason"]) < 150


def test_one_text_beside_several_recordings_is_kept():
    rows = [{"audio": ["wav/200.wav", "wav/500.wav"], "text": t} for t in (["Low.", "Higher."], "Low and higher.", None)]
    for name, some, kept in [("both", rows, ['["Low.", "Higher."]', "Low and higher.", None]), ("one", rows[1:], ["Low and higher.", None])]:
        prepare(jsonl(some), name)
        table = pq.read_table(f"{name}/split=train/part-00000.parquet", partitioning=None)
        assert table["text"].to_pylist() == kept
        assert table["text_sentences"].to_pylist() == [["Low.", "Higher."], *[["200.wav", "500.wav"]]*2][-len(some):]


def test_transcripts_are_neither_cut_nor_cleaned(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = ["No. " + "No! "*60, "🎉", "mm"]
    summary = prepare(jsonl([{"audio": ["wav/200.wav"]*3, "text": said}]), preset="reference", min_unique_chars=4)  # its sat-3l is not needed, and not looked for
    assert open_documents("out=train").text(0) == [s.strip() for s in said] and summary["dropped_sentences"] == 0


def test_answers_to_what_is_heard_are_cut_and_cleaned():
    summary = prepare(jsonl([{"audio": "wav/200.wav", "text": "How? Now? 🎉", "answer": "Yes 🎉. Very much so."}]), target_text_column="answer", remove_emojis=True, max_chars=12)
    docs = open_documents("out=train")
    assert (docs.text(0), docs.target_text(0), summary["concepts"]) == (["How? Now? 🎉"], ["Yes .", "Very", "much so."], 4)


def test_a_broken_file_goes_by_its_full_path(tmp_path):
    "Even if the input is relative, the folder of files is a link, and a part of the path is a path too"
    Path("link").symlink_to("data")
    Path("data/wav/broken.wav").write_bytes(b"RIFF")
    prepare(jsonl([{"audio": "wav/200.wav"}, {"audio": "wav/broken.wav"}, {"audio": "wav/500.wav"}], "link/a.jsonl"))
    reason = json.loads(Path("out/rejected.jsonl").read_text())["reason"]
    assert reason.startswith(f"{(tmp_path/'data/wav/broken.wav').resolve()} cannot be read as audio")


@pytest.mark.parametrize("suffix", ["", ".wav"])
def test_bytes_go_by_their_names_however_many(suffix, tmp_path, monkeypatch):
    "Temporary files are called 1, 10, 11 …, their folder is a link"
    (tmp_path/"real").mkdir()
    (tmp_path/"linked").symlink_to("real")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path/"linked"))
    bytes_of = lambda i: {"bytes": b"RIFF" if i == 10 else tone_file(200), "path": f"talk-{i}{suffix}" if suffix else None}
    pq.write_table(pa.table({"audio": [[bytes_of(i) for i in range(12)], [bytes_of(0)], [bytes_of(1)]]}), "data/a.parquet")
    prepare("data/a.parquet")
    assert json.loads(Path("out/rejected.jsonl").read_text())["reason"].startswith(f"talk-10{suffix} cannot be read" if suffix else "audio 11 cannot be read")


def test_what_fails_behind_a_broken_recording_is_told_alone():
    "An error of a later call does not carry the earlier one with it"
    class Moody(Ear):
        def encode_speech(self, audio, lang, progress=False):
            if len(audio) == 1: raise UserError("The speech model is gone.")
            return super().encode_speech(audio, lang, progress)
    documents = [Document(i, f"x:{i}", {}, recordings=[Recording("b.wav", b"RIFF")]) for i in range(2)]
    with pytest.raises(UserError, match="is gone") as e: hear(documents, "eng_Latn", Moody())
    assert e.value.__context__ is None
