"Segmentation: what needs a model on disk, or more texts than a notebook should run."
import importlib
import random

import numpy as np
import pytest
import torch
from tiny_sat import story_texts, train_tiny_sat

from lcm_nb.concepts.segment import PRESETS, boundary_probs, emoji_sentences, fit, likeliest, load_sat, segment, segment_all, tidy, torn, varied, without_emojis
from lcm_nb.core.errors import UserError

ALPHABET = list("abcABC 123") + ["word ", ". ", "! ", ", ", "; ", " – ", "。", "、", "？", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2029", "\x85", "\x1f", "\u200b", "\ufeff",
           "é", "e\u0301", "\u0e33", "ด้", "👨‍👩‍👧‍👦", "👍🏿", "🇫🇷", "日本", "مرحبا", "שלום", "नमस्ते", "1. ", "A. ", "(b) ", "… ", "«\u00a0", "”", "x"*250]
TOKENS = ["<s>", "</s>", "<pad>", "<unk>", "▁", "\x01", "\x00", "½", "ﷺ"]  # what a tokenizer may take for something else

HARD = [  # language and sentences, to be told apart when a blank (or nothing, in Chinese and Japanese) joins them
    ("eng_Latn", ["It costs 3.14 dollars.", "That is cheap."]),
    ("eng_Latn", ["Dr. Smith met Mr. Jones at 5 p.m. in St. Louis.", "They spoke."]),
    ("eng_Latn", ['"Stop!" he cried.', "Nobody stopped."]),
    ("eng_Latn", ["She lives in the U.S. and works for J. R. Hill.", "He does not."]),
    ("eng_Latn", ["Wait... what?", "I see."]),
    ("eng_Latn", ["See fig. 2 and p. 14, e.g. the left half.", "It is new."]),
    ("eng_Latn", ["We won 🎉!", "Now sleep 😴."]),
    ("eng_Latn", ["Read https://example.org/a.b?c=d.e first.", "Then ask."]),
    ("fra_Latn", ["M. Petit est parti.", "Il pleut."]),
    ("fra_Latn", ["Elle a dit : « Viens ! »", "Il est venu."]),
    ("deu_Latn", ["Am 3. Oktober kam z. B. Frau Dr. Roth.", "Es regnete."]),
    ("spa_Latn", ["¿Quién es?", "¡Soy yo!"]),
    ("zho_Hans", ["我是老师。", "你呢？", "很好！"]),
    ("jpn_Jpan", ["雨が降った。", "外に出た。"]),
    ("hin_Deva", ["यह घर है।", "वह पेड़ है।"]),
    ("arb_Arab", ["أين هو؟", "لا أعرف."]),
    ("eng_Latn", ["1. Buy milk.", "2. Go home."]),
    ("eng_Latn", ["no mark ends this " + "and it goes on and on "*20 + "to here"]),
]


def bare(s): return "".join(s.split())


def check_pieces(text, pieces, size):
    assert bare("".join(pieces)) == bare(text), repr(text)
    assert all(0 < len(p) <= size and p == " ".join(p.split()) for p in pieces), repr(text)


@pytest.fixture(scope="module")
def sat_folder(tmp_path_factory): return train_tiny_sat(tmp_path_factory.mktemp("sat"))


@pytest.fixture(scope="module")
def stories():
    "Sixty stories that the model was not trained on, in three languages"
    texts = story_texts(99, "test")
    return [next(texts) for _ in range(60)]


@pytest.mark.parametrize("lang", ["eng_Latn", "fra_Latn", "jpn_Jpan", "arb_Arab", "tha_Thai", "bod_Tibt"])
def test_nothing_is_lost(lang):
    rng = random.Random(lang)
    for _ in range(1000):
        text, size = "".join(rng.choices(ALPHABET, k=rng.randint(0, 60))), rng.choice([1, 2, 13, 100, 200])
        check_pieces(text, segment(text, lang, max_chars=size), size)


@pytest.mark.parametrize("size", [1, 13, 100, 200])
def test_sat_loses_nothing(sat_folder, size):
    rng = random.Random(size)
    texts = ["".join(rng.choices(ALPHABET + TOKENS, k=rng.randint(0, 40))) for _ in range(60)] + TOKENS
    for text, pieces in zip(texts, segment_all(texts, "en", size, method=sat_folder)): check_pieces(text, pieces, size)


@pytest.mark.parametrize("method, length", [("sentencex", 100_000), ("sat", 5_000)])
def test_a_very_long_text_without_a_boundary(method, length, sat_folder):
    text = "x"*length
    pieces = segment(text, "en", method=sat_folder if method == "sat" else method)
    assert "".join(pieces) == text and max(map(len, pieces)) <= 200 and len(pieces) <= length/50


def test_words_are_cut_only_when_they_alone_are_too_long(sat_folder):
    text = " ".join(random.Random(0).choices(["a", "boat", "lighthouse", "Donaudampfschifffahrt"], k=200))
    for pieces in (fit(text, 40), segment(text, "de", max_chars=40, method=sat_folder)): assert " ".join(pieces).split() == text.split()


def test_no_cap_tears_a_character():
    text = "👨‍👩‍👧‍👦e\u0301👍🏿ด้"*20
    for pieces in (fit(text, 30), likeliest(text, np.random.default_rng(0).random(len(text)), 30)):
        ends = np.cumsum([len(p) for p in pieces])[:-1]
        assert not any(torn(text, int(e)) for e in ends) and max(map(len, pieces)) <= 30


@pytest.mark.parametrize("text", ["", " ", "\n\n\t \u3000"])
def test_blank_text_has_no_sentence(text, sat_folder):
    assert segment(text, "en") == [] and segment(text, "en", method=sat_folder) == []


def f1(found, told):
    "F1 of sentences found, each counted once for a text"
    hits = sum(len(set(f) & set(t)) for f, t in zip(found, told))
    return 2*hits/sum(len(set(f)) + len(set(t)) for f, t in zip(found, told))


def boundaries(pieces): return set(np.cumsum([len(bare(p)) for p in pieces]).tolist())


def test_sat_finds_the_sentences_of_stories_it_has_not_seen(sat_folder, stories):
    texts = [" ".join(s) for s in stories]
    found = segment_all(texts, "en", method=sat_folder)
    score = f1([boundaries(p) for p in found], [boundaries(s) for s in stories])
    rules = f1([boundaries(segment(t, "en")) for t in texts], [boundaries(s) for s in stories])
    print(f"F1 of boundaries in {len(texts)} stories: SaT {score:.3f}, rules {rules:.3f}")
    assert score > 0.9 and rules > 0.9


def test_many_texts_at_once_are_as_one_by_one(sat_folder, stories):
    texts = [" ".join(s) for s in stories[:20]] + ["", "Hello!\n\nSo long."]
    assert segment_all(texts, "en", method=sat_folder) == [segment(t, "en", method=sat_folder) for t in texts]


def test_texts_go_through_the_model_in_full_batches(sat_folder, stories):
    texts, rows = [s for story in stories for s in story], []
    hook = load_sat(sat_folder, None).model.model.register_forward_pre_hook(lambda model, args, kw: rows.append(len(kw["attention_mask"])), with_kwargs=True)
    try: segment_all(texts, "en", method=sat_folder)
    finally: hook.remove()
    print(f"{len(texts)} short texts in {len(rows)} batches")
    assert sum(rows) == len(texts) and rows[:-1] == [max(rows)]*(len(rows) - 1) and len(rows) <= len(texts)/30


def test_hard_cases(sat_folder):
    right = {"sentencex": 0, sat_folder: 0}
    for lang, sentences in HARD:
        text = ("" if lang in ("zho_Hans", "jpn_Jpan") else " ").join(sentences)
        for method in right:
            pieces = segment(text, lang, method=method)
            check_pieces(text, pieces, 200)
            good = pieces == [p for s in sentences for p in fit(s, 200)]
            right[method] += good
            if not good: print("rules" if method == "sentencex" else "SaT", lang, pieces)
    print(f"hard cases right of {len(HARD)}: rules {right['sentencex']}, tiny SaT {right[sat_folder]}")
    assert right["sentencex"] >= 14


def cap_figures(stories, sat, join, strip):
    "For halving and for the likeliest cuts: share that fall between two sentences, and number of pieces, of stories joined to one long sentence"
    figures = {}
    for name, cap in [("halves", lambda t, p: fit(t, 200)), ("likeliest", lambda t, p: tidy(likeliest(t, p, 200)))]:
        cuts = hits = pieces = 0
        for story in stories:
            story = [s.rstrip(strip) for s in story]
            text = join.join(story)
            parts = cap(text, boundary_probs([text], sat)[0])
            ends = boundaries([*[s + join for s in story[:-1]], story[-1]])
            at = boundaries(parts) - {len(bare(text))}
            cuts, hits, pieces = cuts + len(at), hits + len(at & ends), pieces + len(parts)
        figures[name] = (hits/cuts, pieces)
    return figures


def test_both_caps_on_the_same_long_sentences(sat_folder, stories):
    sat = load_sat(sat_folder)
    known, unmarked, commas = (cap_figures(stories[:20], sat, *how) for how in [(" ", ""), (" ", ".!?"), (", ", ".!?")])
    for name, figures in [("ends marked", known), ("no marks", unmarked), ("commas", commas)]:
        print(name, {k: f"{share:.2f} of cuts between sentences, {n} pieces" for k, (share, n) in figures.items()})
    for figures in (known, unmarked):  # a model trained without commas at the end knows nothing of the third kind
        assert figures["likeliest"][0] > figures["halves"][0] and figures["likeliest"][1] < figures["halves"][1]


def test_the_cap_is_the_one_of_wtpsplit(sat_folder, stories):
    "`likeliest` cuts where wtpsplit itself does, unless that is inside a word"
    sat, same = load_sat(sat_folder), 0
    for story in stories[:30]:
        text = " ".join(story)
        theirs = sat.split(text, max_length=200, stride=256, block_size=256, split_on_input_newlines=False, strip_whitespace=True)
        assert max(map(len, theirs)) <= 200
        same += theirs == tidy(likeliest(text, boundary_probs([text], sat)[0], 200))
    print(f"{same} of 30 stories cut alike")
    assert same >= 24


def test_threshold(sat_folder, stories):
    text = " ".join(stories[0])
    many, some = (segment(text, "en", method=sat_folder, threshold=t) for t in (0.05, 0.999999))
    assert len(many) > len(some)


def test_a_folder_without_tokenizer_needs_that_of_xlmr(sat_folder, tmp_path):
    from shutil import copy
    for f in ("config.json", "model.safetensors"): copy(f"{sat_folder}/{f}", tmp_path)
    assert importlib.import_module("lcm_nb.concepts.segment").sat_tokenizer(str(tmp_path)) == "facebookAI/xlm-roberta-base"


def test_device_by_name(sat_folder):
    assert load_sat(sat_folder, "cpu").device == torch.device("cpu")
    with pytest.raises(UserError, match='device "gpu"'): load_sat(sat_folder, "gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match='device "cuda"'): load_sat(sat_folder, "cuda")


def test_gpu_in_half_precision_cuts_alike(sat_folder, stories):
    if not torch.cuda.is_available(): pytest.skip("needs a CUDA device")
    texts = [" ".join(s) for s in stories]
    assert load_sat(sat_folder, "cuda").dtype == torch.float16
    gpu, cpu = (segment_all(texts, "en", method=sat_folder, device=d) for d in ("cuda", "cpu"))
    assert f1([boundaries(p) for p in gpu], [boundaries(p) for p in cpu]) > 0.99


def test_errors_are_one_sentence():
    with pytest.raises(UserError, match="sentencex"): segment("Hi.", "en", method="sentenex")
    with pytest.raises(UserError, match="English|eng_Latn|en"): segment("Hi.", "eng_Latm")
    with pytest.raises(UserError, match="max_chars"): segment("Hi.", "en", max_chars=0)


def test_a_missing_model_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for model in ("sat-3l", str(tmp_path)):
        with pytest.raises(UserError) as e: segment("Hi.", "en", method=model)
        said = str(e.value)
        assert "segment-any-text/" in said and "facebookAI/xlm-roberta-base" in said and "into one folder" in said and "\n" not in said


@pytest.mark.parametrize("emoji", ["😀", "👍🏿", "👨‍👩‍👧‍👦", "🇫🇷", "🏴󠁧󠁢󠁷󠁬󠁳󠁿", "7️⃣", "#⃣", "❤️", "❤️‍🔥", "🏳️‍🌈", "🧑🏽‍🚀", "👩‍❤‍👩", "☎️", "🕵🏼‍♀️", "©️"])
def test_emojis_go_whole(emoji): assert without_emojis(f"a {emoji}b{emoji}{emoji} 1") == "a b 1"


@pytest.mark.parametrize("text", ["0123456789 #*", "© ® ™ ℹ ☎ ❤ ♀ ✓ ★ → ↔ ½ №", "你好。かな！한국어", "नमस्ते ไทย العربية", "e\u0301 ñ \u200d x\ufe0f", "(-: ^_^"])
def test_what_is_no_emoji_stays(text): assert without_emojis(text) == text


def test_sentences_of_emojis_alone_are_counted(sat_folder):
    texts = ["We won! 🎉🎉\n\n👨‍👩‍👧‍👦\n\nBye ❤️ now.", "⭐", "None 1 # ©.", ""]
    assert emoji_sentences(texts, "en") == [2, 1, 0, 0]
    assert segment_all(texts, "en", remove_emojis=True) == [["We won!", "Bye now."], [], ["None 1 # ©."], []]
    assert segment_all(texts, "en", remove_emojis=True, method=sat_folder)[1] == []


def test_reference_settings(sat_folder):
    how = PRESETS["reference"] | {"method": sat_folder}
    assert (PRESETS["reference"]["method"], PRESETS["reference"]["max_chars"]) == ("sat-3l", 256)
    assert segment("Yes. No. 😀😀😀", "en", **how) == ["Yes. No."]  # ten characters at most, once the emojis are gone
    assert max(map(len, segment("word "*200, "en", **how))) > 200


def test_poor_sentences_are_dropped_only_when_asked():
    assert varied(["=====", "aha", "Good."], 0) == ["=====", "aha", "Good."]
    assert varied(["=====", "aha", "Good."], 3) == ["Good."]


def test_prepare_segments_a_shard_together(sat_folder, stories, tmp_path, monkeypatch):
    "The texts of a shard go through the model in one call, and come out as they do alone"
    import json
    from pathlib import Path

    import pyarrow.parquet as pq
    from wtpsplit import SaT

    from lcm_nb.data.prepare import PrepareOptions, prepare
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    calls, whole = [], SaT.predict_proba
    monkeypatch.setattr(SaT, "predict_proba", lambda self, texts, **kw: calls.append(len(texts)) or whole(self, texts, **kw))
    texts = [" ".join(s) for s in stories[:12]]
    (tmp_path/"s.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    prepare(PrepareOptions(str(tmp_path/"s.jsonl"), str(tmp_path/"out"), space="stand_in_space:space", segmentation=sat_folder, max_chars=100, shard=8, validation=0, test=0, progress=False))
    assert calls == [8, 4]
    made = [row for f in sorted((tmp_path/"out").rglob("*.parquet")) for row in pq.read_table(f, columns=["text_sentences"], partitioning=None)["text_sentences"].to_pylist()]
    assert made == [segment(t, "en", 100, method=sat_folder) for t in texts]
