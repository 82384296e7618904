"""SONAR against recorded answers of sonar-space: ids, states, concepts, scores, texts; file layouts, conversion, gradients, errors. Sizes and languages come from the recording."""
import json, shutil, warnings
import pytest, torch
from safetensors.torch import load_file, save_file
from lcm_nb.concepts import sonar
from lcm_nb.concepts.sonar import END, PAD, Search, SonarTokenizer, TruncationWarning, beam_search, convert, load_sonar, read_tensors
from lcm_nb.concepts.space import CoverageWarning, load_space, padded
from lcm_nb.core.errors import UserError

@pytest.fixture(scope="module")
def folder(golden): return golden/"sonar_tiny"

@pytest.fixture(scope="module")
def answers(folder): return json.loads((folder/"answers.json").read_text())

@pytest.fixture(scope="module")
def numbers(folder): return load_file(folder/"tensors.safetensors")

@pytest.fixture(scope="module")
def kept(answers): return [answers["strings"][i] for i in answers["kept"]]

@pytest.fixture(scope="module")
def space(folder): return load_space("sonar", folder, device="cpu")

def ours(ids):
    "fairseq2's numbers of tokens as ours, in lists or tensors"
    if isinstance(ids, torch.Tensor): return torch.where(ids < 4, torch.tensor([1, 3, 0, 2])[ids.clamp(max=3)], ids)
    return [ours(i) if isinstance(i, list) else [1, 3, 0, 2][i] if i < 4 else i for i in ids]

def rows(vocabulary): return [2, 0, 3, 1, *range(4, vocabulary)]

# parity

def test_ids(space, answers):
    t, texts = space.tokenizer, answers["strings"]
    assert t.source(texts, answers["language"]) == ours(answers["source_ids"])
    assert t.source(texts, answers["second_language"]) == ours(answers["second_source_ids"])
    assert t.target(texts, answers["language"]) == ours(answers["target_ids"])
    assert t.pieces(texts) == ours(answers["piece_ids"])
    assert [t.decode(i) for i in t.pieces(texts)] == answers["detokenized"]

def test_one_text_at_a_time_gives_the_same_ids(space, answers):
    assert [space.tokenizer.pieces([t])[0] for t in answers["strings"]] == space.tokenizer.pieces(answers["strings"])

def test_encoder_states(space, numbers):
    ids = ours(numbers["encoder_ids"])
    with torch.inference_mode(): states = space.encoder.states(ids)
    assert (states - numbers["encoder_states"])[ids != PAD].abs().max() <= 1e-5

def test_concepts(space, answers, kept, numbers):
    got = space.encode(kept, answers["language"], check=False)
    assert (got - numbers["embeddings"]).abs().max() <= 1e-5
    single = torch.cat([space.encode([t], answers["language"], check=False) for t in kept])
    assert (single - numbers["embeddings_single"]).abs().max() <= 1e-5

def test_logits(space, numbers):
    name = next(n for n in numbers if n.startswith("logits_first"))
    wanted = numbers[name]
    ids = ours(numbers["target_ids"])[:len(wanted)]
    with torch.inference_mode(): got = space.decoder(numbers["embeddings"][:len(wanted)], ids)
    assert (got - wanted[..., rows(wanted.shape[-1])])[ids != PAD].abs().max() <= 1e-4

def test_beams(space, answers, numbers):
    for asked in answers["beam"]:
        how = {n: asked[n] for n in ("beam_size", "len_penalty", "temperature")} | {"max_length": asked["max_seq_len"]}
        got = space.hypotheses(numbers["embeddings"], answers["language"], **how)
        theirs = [h["nbest"] for h in asked["hypotheses"]]
        assert [[h.ids for h in g] for g in got] == [[ours(h["ids"]) for h in t] for t in theirs]
        assert all(abs(a.score - b["score"]) < 1e-4 for g, t in zip(got, theirs) for a, b in zip(g, t))
        assert space.decode(numbers["embeddings"], answers["language"], **how) == [h["text"] for h in asked["hypotheses"]]

def test_beams_do_not_depend_on_the_batch(space, answers, numbers, monkeypatch):
    how = dict(lang=answers["language"], max_length=20, len_penalty=.5)
    whole = space.decode(numbers["embeddings"], **how)
    monkeypatch.setattr(space, "max_beams", 7)
    assert space.decode(numbers["embeddings"], **how) == whole

# writing one token at a time

def test_writing_equals_teacher_forcing(space, numbers):
    ids, x = ours(numbers["target_ids"])[:8], numbers["embeddings"][:8]
    with torch.inference_mode():
        w, slow = sonar.Writing(space.decoder, x), space.decoder(x, ids)
        for i in range(ids.shape[1]): # past the first sixteen places
            quick = w.next(ids[:, i])
            real = (ids[:, :i+1] != PAD).all(1)
            assert torch.allclose(quick[real], slow[real, i], atol=1e-4)

def test_best_score_is_the_likelihood(space, answers, numbers):
    "A hypothesis' score, computed again by teacher forcing"
    x, lang = numbers["embeddings"][:6], space.tokenizer.language(answers["language"])
    for x1, found in zip(x, beam_search(space.decoder, x, lang, Search(max_length=14, beam_size=3))):
        for h in found:
            ids = torch.tensor([[END, lang, *h.ids]])
            with torch.inference_mode(): lp = space.decoder(x1[None], ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None]).sum().item()
            assert abs(lp/(ids.shape[1] - 1) - h.score) < 1e-4

def test_limits(space, answers, numbers):
    lang = answers["language"]
    for found in space.hypotheses(numbers["embeddings"], lang, max_length=9, min_length=3, beam_size=4):
        assert len(found) == 4 and all(4 <= len(h.ids) <= 7 and h.ids[-1] == END and PAD not in h.ids for h in found)
    assert all(len(h[0].ids) <= space.max_length for h in space.hypotheses(numbers["embeddings"], lang, max_length=10_000, beam_size=1))
    unknown = space.hypotheses(numbers["embeddings"], lang, max_length=20, unk_penalty=1e4)
    assert all(sonar.UNKNOWN not in h.ids for found in unknown for h in found)
    assert space.decode(numbers["embeddings"][:0], lang) == []

def test_sampling(space, answers, numbers, monkeypatch):
    x, lang = numbers["embeddings"], answers["language"]
    greedy = space.decode(x, lang, beam_size=1, max_length=14)
    assert space.decode(x, lang, sample=True, top_k=1, max_length=14) == greedy
    assert space.decode(x, lang, sample=True, top_p=1e-6, max_length=14) == greedy
    drawn = space.decode(x, lang, sample=True, max_length=14, seed=3)
    assert drawn != space.decode(x, lang, sample=True, max_length=14, seed=4)
    monkeypatch.setattr(space, "max_beams", 6)
    assert space.decode(x, lang, sample=True, max_length=14, seed=3) == drawn

# gradients

def test_gradient_through_the_frozen_decoder(space, answers, kept, numbers):
    x = numbers["embeddings"][:3].clone().requires_grad_()
    loss = lambda x: -space.log_likelihood(x, kept[:3], answers["language"]).sum()
    loss(x).backward()
    assert all(p.grad is None for p in space.parameters())
    with torch.no_grad(): slope = (loss(x + 1e-3*x.grad/x.grad.norm()) - loss(x - 1e-3*x.grad/x.grad.norm()))/2e-3
    assert abs(slope/x.grad.norm() - 1) < 2e-2 # the steepest slope is the gradient's length

def test_both_halves_train_and_are_saved(folder, answers, kept, tmp_path):
    space = load_space("sonar", folder, device="cpu").requires_grad_()
    ids = padded(space.tokenizer.source(kept[:4], answers["language"]), PAD)
    optimizer, values = torch.optim.Adam(space.parameters(), lr=3e-3), []
    for _ in range(5):
        loss = -space.log_likelihood(space.encoder(ids), kept[:4], answers["language"]).mean()
        loss.backward(); optimizer.step(); optimizer.zero_grad(); values.append(loss.item())
    assert values[-1] < values[0]
    space.save_pretrained(tmp_path/"tuned")
    tuned = load_space(str(tmp_path/"tuned"), device="cpu")
    assert torch.equal(tuned.encode(kept, answers["language"], check=False), space.encode(kept, answers["language"], check=False))
    original = load_space("sonar", folder, device="cpu")
    assert tuned.id != original.id and original.id == load_space(original.id, folder, device="cpu").id # the files are as they were
    with pytest.raises(UserError, match="is now"): load_space(original.id, tmp_path/"tuned", device="cpu")

# files

def test_conversion(space, folder, answers, kept, numbers, tmp_path):
    new = load_space("sonar", convert(folder, tmp_path/"new"), device="cpu")
    assert sorted(f.name for f in (tmp_path/"new").iterdir()) == ["config.json", "decoder.safetensors", "encoder.safetensors", "sentencepiece.model"]
    for again in (new, load_space("sonar", tmp_path/"new", device="cpu"), load_space(str(tmp_path/"new"), device="cpu"), load_space(f"sonar:{tmp_path}/new", device="cpu")):
        assert again.id == space.id and again.languages == space.languages
    assert torch.equal(again.encode(kept, answers["language"], check=False), space.encode(kept, answers["language"], check=False))
    assert again.decode(numbers["embeddings"], answers["language"], max_length=16) == space.decode(numbers["embeddings"], answers["language"], max_length=16)
    half = load_space("sonar", convert(tmp_path/"new", tmp_path/"half", dtype="float16"), device="cpu")
    assert half.id != space.id and (tmp_path/"half"/"encoder.safetensors").stat().st_size < .7*(tmp_path/"new"/"encoder.safetensors").stat().st_size
    assert torch.allclose(half.encode(kept, answers["language"], check=False), numbers["embeddings"], atol=1e-2)
    with pytest.raises(UserError, match="not empty"): convert(folder, tmp_path/"new")
    with pytest.raises(UserError): convert(folder, tmp_path/"wrong", heads=5)
    assert not (tmp_path/"wrong").exists()

def layouts(folder, where):
    "The recording's weights in every other layout: folder -> options"
    state = {h: sonar.checkpoints(folder/f"{h}.pt")[h] for h in ("encoder", "decoder")}
    decoder = sonar.untied(state["decoder"])
    heads = sonar.facts(folder)["heads"]
    def at(name):
        (where/name).mkdir()
        shutil.copy(folder/"sentencepiece.model", where/name/"sentencepiece.bpe.model")
        return where/name
    at("fairseq"); torch.save({"state_dict": state["encoder"] | {"version": torch.ones(1), "embed_positions._float_tensor": torch.ones(1)}}, where/"fairseq"/"a.pt")
    torch.save({"state_dict": {f"decoder.{n}": w for n, w in decoder.items()} | {"decoder.output_projection.weight": decoder["embed_tokens.weight"], "decoder.version": torch.ones(1)}}, where/"fairseq"/"b.pt")
    at("old"); [torch.save(state[h], where/"old"/f"{h}.bin", _use_new_zipfile_serialization=False) for h in state]
    at("port"); both = {f"model.{h}.{n}": w.clone() for h, s in (("encoder", state["encoder"]), ("decoder", decoder)) for n, w in s.items()}
    save_file(both | {"lm_head.weight": decoder["embed_tokens.weight"].clone()}, where/"port"/"model.safetensors")
    at("shards"); parts = [dict(list(both.items())[i::2]) for i in (0, 1)]
    [save_file(p, where/"shards"/f"model-0000{i + 1}-of-00002.safetensors") for i, p in enumerate(parts)]
    for name in ("port", "shards"): (where/name/"config.json").write_text(json.dumps({"model_type": "m2m_100", "encoder_attention_heads": heads}))
    (where/"shards"/"training_args.bin").write_bytes(b"something else")
    return {"fairseq": {"heads": heads}, "old": {"heads": heads}, "port": {}, "shards": {}}

def test_every_layout_gives_the_same_space(space, folder, answers, kept, numbers, tmp_path, monkeypatch):
    known = {n: sonar.facts(folder)[n] for n in ("languages", "max_length")}
    for name, options in layouts(folder, tmp_path).items():
        other = load_space("sonar", tmp_path/name, device="cpu", **known, **options)
        assert other.id == space.id, name
        assert torch.equal(other.encode(kept, answers["language"], check=False), space.encode(kept, answers["language"], check=False)), name
        assert other.decode(numbers["embeddings"][:9], answers["language"], max_length=14) == space.decode(numbers["embeddings"][:9], answers["language"], max_length=14)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: asked.append(repo) or str(tmp_path/"port"))
    assert load_space("sonar", "hf://someone/sonar-port", device="cpu", **known).id == space.id and asked == ["someone/sonar-port"]

def test_separate_files(space, folder, answers, kept, numbers, tmp_path):
    for name in ("encoder.pt", "decoder.pt", "sentencepiece.model"): (tmp_path/name[:3]).mkdir(); shutil.copy(folder/name, tmp_path/name[:3]/name)
    known = sonar.facts(folder)
    parts = dict(encoder=tmp_path/"enc"/"encoder.pt", decoder=tmp_path/"dec", tokenizer=tmp_path/"sen"/"sentencepiece.model")
    assert load_space("sonar", device="cpu", **parts, **known).id == space.id
    only = load_space("sonar", device="cpu", encoder=parts["encoder"], tokenizer=parts["tokenizer"], **known)
    assert only.id == space.id and torch.equal(only.encode(kept, answers["language"], check=False), space.encode(kept, answers["language"], check=False))
    with pytest.raises(UserError, match="text_sonar_basic_decoder"): only.decode(numbers["embeddings"], answers["language"])
    only = load_space("sonar", device="cpu", decoder=parts["decoder"], tokenizer=parts["tokenizer"], **known)
    assert only.decode(numbers["embeddings"][:3], answers["language"], max_length=12) == space.decode(numbers["embeddings"][:3], answers["language"], max_length=12)
    with pytest.raises(UserError, match="text_sonar_basic_encoder"): only.encode(kept, answers["language"])
    with pytest.raises(UserError, match="SentencePiece"): load_space("sonar", tmp_path/"enc", device="cpu", **known)
    convert(None, tmp_path/"new", **parts, **known)
    (tmp_path/"new"/"encoder.safetensors").unlink()
    assert load_space("sonar", tmp_path/"new", device="cpu").id == space.id # a decoder alone remembers whose it is

def test_loading_copies_nothing(folder):
    "The parameters are the file's pages, and what is changed in them does not reach the file"
    before, space = (folder/"encoder.pt").read_bytes(), load_sonar(folder, device="cpu")
    assert not any(p.is_meta or p.requires_grad for p in space.parameters())
    mapped = {n: w for n, w in read_tensors(folder/"encoder.pt").items()}
    spots = sorted(w.data_ptr() for w in space.encoder.model.parameters())
    assert spots[-1] - spots[0] < sum(w.nbytes for w in mapped.values()) + 64*len(mapped)*64
    with torch.no_grad(): [p.zero_() for p in space.parameters()]
    assert before == (folder/"encoder.pt").read_bytes()

def test_half_precision(folder, answers, kept, numbers):
    low = load_space("sonar", folder, device="cpu", dtype="bfloat16")
    got = low.encode(kept, answers["language"], check=False)
    assert got.dtype == torch.float32 and torch.nn.functional.cosine_similarity(got, numbers["embeddings"]).min() > .99
    assert len(low.decode(got, answers["language"], max_length=12)) == len(kept)

# text that is empty or too long

def test_truncation_is_reported(folder, answers):
    space, lang, texts = load_space("sonar", folder, device="cpu"), answers["language"], ["zebra "*200, "x", "horse "*300]
    with pytest.warns(TruncationWarning, match="2 of 3"): x = space.encode(texts, lang, check=False)
    assert space.truncated == 2
    cut = torch.tensor([space.tokenizer.source(texts[:1], lang)[0][:space.max_length]])
    with torch.inference_mode(): assert torch.allclose(space.encoder(cut)[0], x[0], atol=1e-5)
    with pytest.raises(UserError, match="2 of 3"): space.encode(texts, lang, strict=True)
    assert space.coverage([*texts, " "], lang) == space.covers([*texts, " "], None, lang) == [False, True, False, False]

def test_order_doubles_and_empty(space, answers, kept):
    lang = answers["language"]
    assert space.encode([], lang).shape == (0, space.dim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = space.encode(kept + kept[::-1], lang), space.encode(kept, lang)
    assert torch.equal(a[:len(kept)], b) and torch.equal(a[len(kept):], b.flip(0))
    with pytest.warns(CoverageWarning): space.encode([""], lang)
    with pytest.raises(UserError, match="brackets"): space.encode("one string", lang)

# errors

def test_wrong_files(folder, tmp_path, monkeypatch):
    for path in (tmp_path/"none", tmp_path): # missing; empty
        with pytest.raises(UserError, match=r"sonar_text_encoder.pt .*text_sonar_basic_encoder.*sentencepiece.source.256000.model"): load_space("sonar", path)
    monkeypatch.setenv("LCM_NB_SONAR", str(tmp_path/"none"))
    with pytest.raises(UserError, match=f"no SONAR at {tmp_path}/none"): load_space("sonar")
    monkeypatch.setenv("LCM_NB_SONAR", str(folder))
    assert load_space("sonar", device="cpu").dim
    shutil.copytree(folder, tmp_path/"two"); shutil.copy(folder/"encoder.pt", tmp_path/"two"/"encoder2.pt")
    with pytest.raises(UserError, match="encoder="): load_space("sonar", tmp_path/"two")
    assert load_space("sonar", tmp_path/"two", encoder=folder/"encoder.pt", tokenizer=folder/"sentencepiece.model", device="cpu")
    with pytest.raises(UserError, match="holds no SONAR decoder"): load_space("sonar", folder, decoder=folder/"encoder.pt")
    with pytest.raises(UserError, match="SentencePiece"): load_space("sonar", folder, tokenizer=folder/"cards.yaml")
    with pytest.raises(UserError, match="could not be fetched"):
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: 1/0)
        load_space("sonar", "hf://no/where")

def test_wrong_weights(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"m")
    data = torch.load(folder/"decoder.pt", weights_only=True)
    gone = {n: w for n, w in data["model"].items() if n != "decoder.layer_norm.bias"}
    for model, says in ((gone, "lacks tensor layer_norm.bias"), (data["model"] | {"decoder.odd": torch.ones(1)}, "unknown tensor odd"), (data["model"] | {"decoder.layer_norm.bias": torch.ones(3)}, "wrong size"),
                        (data["model"] | {"final_proj.weight": data["model"]["final_proj.weight"] + 1}, "not its embedding")):
        torch.save({"model": model}, tmp_path/"m"/"decoder.pt")
        with pytest.raises(UserError, match=says): load_space("sonar", tmp_path/"m", device="cpu")
    torch.save({"model": data["model"], "args": json.JSONDecoder}, tmp_path/"m"/"decoder.pt")
    with pytest.raises(UserError, match="trust_pickle=True"): load_space("sonar", tmp_path/"m", device="cpu")
    assert load_space("sonar", tmp_path/"m", device="cpu", trust_pickle=True)
    for content in (b"", b"not weights", (folder/"decoder.pt").read_bytes()[:9000]):
        (tmp_path/"m"/"decoder.pt").write_bytes(content)
        with pytest.raises(UserError, match="fetch it again"): load_space("sonar", tmp_path/"m", device="cpu")
    (tmp_path/"x.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match="fetch it again"): read_tensors(tmp_path/"x.safetensors")

def test_wrong_options(space, folder, answers, numbers):
    lang, x = answers["language"], numbers["embeddings"][:1]
    with pytest.raises(UserError, match="languages="): load_space("sonar", folder, languages=["eng_Latn"], device="cpu")
    with pytest.raises(UserError, match="heads="): load_space("sonar", folder, heads=7, device="cpu")
    with pytest.raises(UserError, match='only="both"'): load_space("sonar", folder, only="both")
    with pytest.raises(UserError, match="float99"): load_space("sonar", folder, dtype="float99")
    with pytest.raises(UserError, match='"dtype"'): load_space("sonar", folder, dtipe="float16")
    with pytest.raises(UserError, match="eng_Latn"): space.encode(["Hi."], "eng_Latin")
    with pytest.raises(UserError, match="beam_size"): space.decode(x, lang, beam=3)
    for wrong in (dict(beam_size=0), dict(temperature=0.), dict(max_length=2)):
        with pytest.raises(UserError, match="at least"): space.decode(x, lang, **wrong)
    with pytest.raises(UserError, match=r"\(n, "): space.decode(torch.zeros(1, 3), lang)
    with pytest.raises(UserError, match="NaN"): space.decode(torch.full((1, space.dim), torch.nan), lang)

def test_languages_of_the_published_models(folder):
    t = SonarTokenizer(folder/"sentencepiece.model")
    assert len(t.languages) == 202 and [t.language(l) - t.first for l in ("eng_Latn", "deu_Latn", "fra_Latn")] == [46, 41, 56]
