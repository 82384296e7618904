"""A small SONAR with random weights, made by Meta's own code: text encoder, decoder and one speech encoder, as files that both backends read.

python tests/tiny_sonar.py FOLDER '{"dim": 32, …}'      in the environment of sonar-space; FOLDER holds a SentencePiece model
"""
import json
import random
import sys
from pathlib import Path

SIZES = dict(pieces=1300, dim=64, layers=2, heads=4, ffn=128, max_length=64, languages=["deu_Latn", "eng_Latn", "jpn_Jpan", "arb_Arab"], speech="eng")
SCRIPTS = {"Latn": "az", "Latn2": "àÿ", "Grek": "αω", "Cyrl": "ая", "Armn": "աֆ", "Hebr": "את", "Arab": "بي", "Deva": "कह", "Beng": "কহ", "Guru": "ਕਹ", "Gujr": "કહ", "Taml": "கஹ",
           "Telu": "కహ", "Knda": "ಕಹ", "Mlym": "കഹ", "Sinh": "කහ", "Thai": "กฮ", "Laoo": "ກຮ", "Tibt": "ཀཧ", "Mymr": "ကဟ", "Geor": "აჰ", "Hang": "가겧", "Ethi": "ሀቧ", "Khmr": "កហ",
           "Hira": "あん", "Kana": "アン", "Hans": "一丧", "Emoji": "😀😏", "Digits": "09", "Signs": "!/"}
AWKWARD = ["", " ", "a", "  two  blanks ", "tab\there", "new\nline", "ﬁgure Ｆｕｌｌ　ｗｉｄｔｈ", "e\u0301 é", "x"*300, "word "*90, "مرحبا، بالعالم؟", "👩‍👩‍👧 flag 🇫🇷", "\u200b\ufeff", "1,234.5 %", "— «quotes» “too”"]


def sentences(n=10, seed=0):
    "Strings in every script, `n` of each, and awkward ones"
    rng = random.Random(seed)
    def word(a, b): return "".join(chr(rng.randint(ord(a), ord(b))) for _ in range(rng.randint(1, 7)))
    return [" ".join(word(*span) for _ in range(rng.randint(1, 12))) + rng.choice([".", "?", "", " !"]) for span in SCRIPTS.values() for _ in range(n)] + AWKWARD


def train_tokens(folder, pieces, texts):
    "A SentencePiece model as SONAR's: unknown, start and end, and no pad"
    import sentencepiece
    Path(folder).mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_prefix=f"{folder}/sentencepiece", vocab_size=pieces, model_type="bpe", character_coverage=.98,
                                             unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)


def perturb(model, scale=.2):
    "Give every norm and bias a value of its own, so that a swapped one shows"
    import torch
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1: p.add_(scale*torch.randn_like(p))


def make(folder, pieces, dim, layers, heads, ffn, max_length, languages, speech):
    "Write weights and cards to `folder`"
    import torch
    import sonar  # noqa: F401  registers its models
    from fairseq2.assets import AssetCard
    from sonar.models.sonar_speech import get_sonar_speech_encoder_hub
    from sonar.models.sonar_text import get_sonar_text_decoder_hub, get_sonar_text_encoder_hub
    folder, device = Path(folder), torch.device("cpu")
    vocabulary = dict(size=pieces + 1 + len(languages) + 3, unk_idx=1, bos_idx=2, eos_idx=3, pad_idx=1)
    text = dict(model_dim=dim, max_seq_len=max_length, num_encoder_layers=layers, num_decoder_layers=layers, num_encoder_attn_heads=heads, num_decoder_attn_heads=heads,
                ffn_inner_dim=ffn, vocab_info=vocabulary)
    tokens = dict(tokenizer="sentencepiece.model", tokenizer_family="nllb", tokenizer_config={"_set_": dict(default_lang=languages[0], langs=languages)})
    conformer = dict(model_dim=dim, num_encoder_layers=2, num_encoder_attn_heads=heads, ffn_inner_dim=ffn, depthwise_conv_kernel_size=7)
    cards = [dict(name="small_encoder", model_family="transformer_encoder", model_arch="basic", checkpoint="encoder.pt", model_config={"_set_": text}, **tokens),
             dict(name="small_decoder", model_family="transformer_decoder", model_arch="basic", checkpoint="decoder.pt", model_config={"_set_": text}, **tokens),
             dict(name="small_speech", model_family="sonar_speech", model_arch="english", checkpoint="speech.pt",
                  model_config={"_set_": dict(model_dim=dim, num_decoder_layers=2, num_decoder_attn_heads=heads, ffn_inner_dim=ffn, max_seq_len=64), "w2v2_encoder_config": {"_set_": conformer}},
                  tokenizer_config={"_set_": dict(default_lang=speech, langs=[speech])})]
    for seed, (card, hub) in enumerate(zip(cards, (get_sonar_text_encoder_hub, get_sonar_text_decoder_hub, get_sonar_speech_encoder_hub))):
        torch.manual_seed(seed)
        model = hub().create_new_model(hub().get_model_config(AssetCard(card["name"], card)), device=device)
        perturb(model)
        if "decoder" in card["name"]: steer(model)
        torch.save({"model": model.state_dict()}, folder/card["checkpoint"])
    (folder/"cards.yaml").write_text("\n---\n".join(json.dumps(c) for c in cards))


def steer(decoder):
    "Let the decoder heed its vector and all of its text, and end some texts early"
    import torch
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if "decoder.layers" in name and p.ndim > 1: p.mul_(4) # else the last token alone decides the next
        table, norm = decoder.decoder_frontend.embed.weight, decoder.decoder.layer_norm
        table[3] += 0.4*table.norm(dim=1).mean()*norm.bias/norm.bias.norm()


if __name__ == "__main__": make(sys.argv[1], **json.loads(sys.argv[2]))
