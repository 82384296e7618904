"""Segmentation: what needs a model on disk, or more texts than a notebook should run."""
import random
import pytest
from lcm_nb.concepts.segment import fit, segment
from lcm_nb.core.errors import UserError

ALPHABET = list("abcABC 123") + ["word ", ". ", "! ", ", ", "; ", " – ", "。", "、", "？", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2029", "\x85", "\x1f", "\u200b", "\ufeff",
           "é", "e\u0301", "\u0e33", "ด้", "👨‍👩‍👧‍👦", "👍🏿", "🇫🇷", "日本", "مرحبا", "שלום", "नमस्ते", "1. ", "A. ", "(b) ", "… ", "«\u00a0", "”", "x"*250]

def bare(s): return "".join(s.split())

@pytest.fixture(scope="module")
def sat_folder(tmp_path_factory):
    "A SaT model with random weights, one token per letter: enough to see that its cuts are used and nothing is lost"
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from wtpsplit.configs import SubwordXLMConfig
    from wtpsplit.models import SubwordXLMForTokenClassification
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?'-▁"
    tokens = [("<s>", 0.), ("<pad>", 0.), ("</s>", 0.), ("<unk>", -20.)] + [(c, -3.) for c in letters]
    tokenizer = Tokenizer(models.Unigram(tokens, unk_id=3))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", cls_token="<s>", pad_token="<pad>", eos_token="</s>", sep_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    model = SubwordXLMForTokenClassification(SubwordXLMConfig(vocab_size=len(fast), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                                              intermediate_size=32, max_position_embeddings=514, num_labels=1, pad_token_id=1))
    folder = tmp_path_factory.mktemp("sat")
    model.save_pretrained(folder); fast.save_pretrained(folder)
    return str(folder)

@pytest.mark.parametrize("lang", ["eng_Latn", "fra_Latn", "jpn_Jpan", "arb_Arab", "tha_Thai", "bod_Tibt"])
def test_nothing_is_lost(lang):
    rng = random.Random(lang)
    for _ in range(1000):
        text, size = "".join(rng.choices(ALPHABET, k=rng.randint(0, 60))), rng.choice([1, 2, 13, 100, 200])
        pieces = segment(text, lang, max_chars=size)
        assert bare("".join(pieces)) == bare(text), repr(text)
        assert all(0 < len(p) <= size and p == " ".join(p.split()) for p in pieces), repr(text)

def test_a_very_long_text_without_a_boundary():
    text = "x"*100_000
    pieces = segment(text, "en")
    assert "".join(pieces) == text and max(map(len, pieces)) <= 200 and min(map(len, pieces)) >= 50

def test_words_are_cut_only_when_they_alone_are_too_long():
    text = " ".join(random.Random(0).choices(["a", "boat", "lighthouse", "Donaudampfschifffahrt"], k=400))
    assert " ".join(fit(text, 40)).split() == text.split()

@pytest.mark.parametrize("text", ["", " ", "\n\n\t \u3000"])
def test_blank_text_has_no_sentence(text, sat_folder):
    assert segment(text, "en") == [] and segment(text, "en", method=sat_folder) == []

def test_sat_from_a_folder(sat_folder):
    text = "Hello there my friend. How\nare you?\n\n  Fine é你好 👍🏽"
    many, some, none = (segment(text, "en", method=sat_folder, threshold=t) for t in (0.2, 0.5, 0.9))
    assert len(many) > len(some) > len(none)
    assert none == ["Hello there my friend. How are you?", "Fine é你好 👍🏽"]
    for pieces in (many, some, none): assert bare("".join(pieces)) == bare(text)
    assert max(map(len, segment("word "*300, "en", method=sat_folder, threshold=0.9))) <= 200

def test_errors_are_one_sentence(sat_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="sentencex"): segment("Hi.", "en", method="sentenex")
    with pytest.raises(UserError, match="English|eng_Latn|en"): segment("Hi.", "eng_Latm")
    with pytest.raises(UserError, match="max_chars"): segment("Hi.", "en", max_chars=0)

def test_a_broken_sat_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="could not be loaded"): segment("Hi.", "en", method=str(tmp_path))
