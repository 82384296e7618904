"""Evaluation on a toy world and a toy space: properties that any model, world and space must show"""
import json
import numpy as np
import pytest
import torch
from lcm_nb.concepts.space import ConceptSpace
from lcm_nb.core.errors import UserError
from lcm_nb.evaluation import evaluate as ev
from lcm_nb.evaluation.metrics import bootstrap, contrastive_accuracy, paired
from lcm_nb.evaluation.predictors import CopyLast, Oracle, OracleSample, make_baselines
from lcm_nb.evaluation.tasks import Continuation, NextSentence, Sample, neighbours

WORDS = ["wakes", "eats", "walks", "sings", "sleeps"]
NEXT = {None: {"wakes": 1.}, "wakes": {"eats": .5, "walks": .5}, "eats": {"walks": .7, "sings": .3}, "walks": {"eats": .2, "sings": .5, "sleeps": .3},
        "sings": {"walks": .6, "sleeps": .4}, "sleeps": {"wakes": 1.}}


class ToyWorld:
    "A cat whose day is a Markov chain; the state is what it did last"
    languages, end = ["eng_Latn"], "end"
    def start(self): return ()
    def parse(self, text, lang): return next((w for w in WORDS if text == f"The cat {w}."), None)
    def tell(self, event, lang="eng_Latn"): return f"The cat {event}."
    def next(self, state): return list(NEXT[state[-1] if state else None].items())
    def step(self, state, event): return (*state, event) if event in dict(self.next(state)) else None
    def consistent(self, text, state, lang="eng_Latn"): return self.step(state, self.parse(text, lang)) is not None


class ToySpace(ConceptSpace):
    "Five sentences, five vectors"
    id, dim, languages, license = "toy@1", 6, ["eng_Latn"], ""
    table = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)) + .5
    def encode_batch(self, texts, lang): return self.table[[WORDS.index(ToyWorld().parse(t, lang)) for t in texts]]
    def decode_batch(self, concepts, lang): return [f"The cat {WORDS[i]}." for i in torch.cdist(concepts, self.table).argmin(1)]


WORLD, SPACE = ToyWorld(), ToySpace()


def story(i, n=7):
    rng, state = np.random.default_rng(i), ()
    for _ in range(n):
        events, p = zip(*WORLD.next(state))
        state = WORLD.step(state, events[rng.choice(len(events), p=p)])
    texts = [WORLD.tell(e, "eng_Latn") for e in state]
    return Sample(f"cat-{i}", SPACE.encode(texts, "eng_Latn"), texts)


@pytest.fixture(scope="module")
def stories(): return [story(i) for i in range(150)]


@pytest.fixture(scope="module")
def train(): return [story(i).concepts for i in range(1000, 1300)]


def oracle(stories): return Oracle(WORLD, SPACE, {s.id: s.texts for s in stories})


@pytest.fixture(scope="module")
def judged(stories, train):
    o = oracle(stories)
    task = NextSentence(stories, SPACE, oracle=o)
    names = ["truth", "copy_last", "context_mean", "random", "nearest", "oracle", "oracle_sample"]
    return {n: task.judge(task.ask(p)) for n, p in make_baselines(names, stories, train, o).items()}


mean = lambda j, m: np.nanmean(j.values[m])


def test_truth_is_perfect(judged):
    t = judged["truth"]
    assert mean(t, "ca") == 1 and mean(t, "l2") == 0 and mean(t, "exact") == 1 and mean(t, "consistency") == 1
    np.testing.assert_allclose(mean(t, "par"), 1, rtol=1e-5)


def test_ca_of_noise_is_one_half():
    pool = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(400, 32, generator=torch.Generator().manual_seed(1))
    skip = neighbours(np.repeat(np.arange(100), 4))
    assert abs(contrastive_accuracy(noise, pool, pool, skip).mean() - .5) < .03
    one = contrastive_accuracy(noise, pool, pool, skip, block=7)
    assert torch.equal(one, contrastive_accuracy(noise, pool, pool, skip, block=1000))   # blocks change nothing


def test_ca_by_hand():
    "Against the definition, one sentence at a time"
    pool = torch.randn(30, 4, generator=torch.Generator().manual_seed(2)); pred = pool + .8*torch.randn(30, 4, generator=torch.Generator().manual_seed(3))
    skip = neighbours(np.repeat(np.arange(5), 6))
    for i, got in enumerate(contrastive_accuracy(pred, pool, pool, skip)):
        others = [j for j in range(30) if j not in {i} | {j for j in (i-1, i+1) if 0 <= j < 30 and j//6 == i//6}]
        farther = [(pred[i]-pool[j]).norm() > (pred[i]-pool[i]).norm() for j in others]
        assert abs(float(got) - np.mean(farther)) < 1e-6


def test_oracle_has_the_least_squared_error(judged):
    floor = mean(judged["oracle"], "l2_squared")
    for n in ["copy_last", "context_mean", "random", "nearest", "oracle_sample"]: assert mean(judged[n], "l2_squared") > floor, n
    ratio = mean(judged["oracle_sample"], "l2_squared")/floor
    assert abs(ratio - 2) < .3      # a draw pays its own spread and the truth's


def test_the_mean_leaves_the_sentences_and_a_draw_does_not(judged):
    assert abs(mean(judged["oracle_sample"], "gap")) < 1e-5
    assert mean(judged["oracle"], "gap") > .1
    np.testing.assert_allclose(judged["oracle"].values["gap"], judged["oracle"].values["l2_roundtrip"] - judged["oracle"].values["l2"])


def test_consistency(judged):
    assert mean(judged["oracle_sample"], "consistency") == 1
    assert mean(judged["copy_last"], "consistency") == 0      # no cat does the same thing twice in a row
    assert mean(judged["nearest"], "consistency") > .95


def test_coverage(stories):
    o = oracle(stories)
    task = NextSentence(stories, SPACE, oracle=o)
    cover = lambda p: task.coverage(p, draws=3, most=80).values["coverage"].mean()
    assert abs(cover(OracleSample(o)) - 1) < .04
    assert cover(o) < .9            # the mean says one thing only


def test_continuations(stories, train):
    o = oracle(stories)
    task = Continuation(stories, SPACE, 3, oracle=o, batch_size=32)
    j = {n: task.judge(task.ask(p)) for n, p in make_baselines(["truth", "copy_last", "random", "oracle"], stories, train, o).items()}
    assert mean(j["truth"], "rougeL") == mean(j["truth"], "length") == mean(j["truth"], "story_consistency") == 1
    assert mean(j["oracle"], "story_consistency") == 1 > mean(j["random"], "story_consistency")
    assert mean(j["copy_last"], "length") == 1
    assert j["truth"].texts[0] == stories[0].texts[3:]
    with pytest.raises(UserError, match="smaller prompt_sentences"): Continuation(stories, SPACE, 7)


def test_supervised_pairs_ask_for_the_target_only(stories):
    pairs = [Sample(s.id, s.concepts, s.texts, source=4) for s in stories]
    task = NextSentence(pairs, SPACE)
    assert len(task.true) == 3*len(stories) and set(task.position) == {4, 5, 6}
    whole = NextSentence(stories, SPACE)
    np.testing.assert_allclose(task.judge(task.ask(CopyLast())).values["par"], whole.judge(whole.ask(CopyLast())).values["par"][whole.position >= 4], rtol=1e-5)
    assert Continuation(pairs, SPACE, 1).judge(Continuation(pairs, SPACE, 1).ask(CopyLast())).texts[0] == [stories[0].texts[3]]*3


def test_answers_do_not_depend_on_the_batch(stories, train):
    o = oracle(stories)
    for n, p in make_baselines(["random", "nearest", "oracle", "oracle_sample"], stories, train, o).items():
        one, all_ = (NextSentence(stories, SPACE, oracle=o, batch_size=b) for b in (1, 64))
        torch.testing.assert_close(one.ask(p), all_.ask(p), msg=n)


def test_bootstrap_holds_what_it_promises():
    def trial(seed):
        rng = np.random.default_rng(seed)
        docs = np.repeat(np.arange(30), rng.integers(2, 9, 30))
        i = bootstrap(rng.normal(size=30)[docs] + rng.normal(size=len(docs)), docs, draws=200)
        return i.low <= 0 <= i.high
    assert .88 < np.mean([trial(s) for s in range(200)]) <= 1
    rng = np.random.default_rng(0)
    a, docs = rng.normal(size=90), np.repeat(np.arange(30), 3)
    assert bootstrap(a, docs) == bootstrap(a, docs)
    assert paired(a, a, docs) == (0, 0, 0)
    with_gaps = np.where(np.arange(90) % 5 == 0, np.nan, a)
    assert bootstrap(with_gaps, docs).mean == pytest.approx(np.nanmean(with_gaps))


def test_score_names_and_intervals(stories, train, monkeypatch):
    monkeypatch.setattr(ev, "story_world", lambda samples, lang: WORLD)
    s = ev.score({"mine": CopyLast()}, stories, SPACE, baselines=["oracle", "random"], train=train, prompt_sentences=3, coverage_draws=2)
    assert list(s) == ["mine", "oracle", "random"] and s["mine"]["documents"] == 150 and s["mine"]["sentences"] == 900
    for r in s.values():
        for m in ev.METRICS: assert r[f"{m}_low"] - 1e-9 <= r[m] <= r[f"{m}_high"] + 1e-9, m
    monkeypatch.setattr(ev, "story_world", lambda samples, lang: None)
    assert ev.score({"mine": CopyLast()}, stories, SPACE)["mine"]["consistency"] is None


@pytest.fixture
def card(tmp_path, monkeypatch):
    from lcm_nb.data.cards import DataCard, concept_column, save_card, write_concepts
    for split, numbers in dict(train=range(1000, 1100), validation=range(40)).items():
        some = [story(i) for i in numbers]
        write_concepts(tmp_path/f"data/cats/split={split}/part-00000.parquet", {"id": [s.id for s in some], "text_sentences": [s.texts for s in some],
            "text_sentences_sonar_emb": concept_column([s.concepts.numpy() for s in some], "float32")}, space="toy@1", dim=6, lang="eng_Latn")
    save_card(tmp_path/"data/cats.yaml", DataCard("cats", "cats", space="toy@1", dim=6, space_ref=f"{__name__}:ToySpace"))
    monkeypatch.setenv("LCM_NB_CARDS", str(tmp_path/"data"))
    monkeypatch.setattr(ev, "story_world", lambda samples, lang: WORLD)
    return "cats"


@pytest.fixture
def model(tmp_path):
    from lcm_nb.models.config import preset
    from lcm_nb.models.lcm import build_lcm
    torch.manual_seed(0)
    config = preset("base_lcm_mini", concept_dim=6, dim=16, normalizer=None, **{"decoder.layers": 1, "decoder.heads": 2, "decoder.ffn_dim": 16})
    build_lcm(config, space="toy@1").save_pretrained(tmp_path/"models/base")
    return str(tmp_path/"models/base")


def options(card, model, folder, **changes): return ev.EvaluateOptions(models=[model], card=card, dump_dir=str(folder), coverage_draws=2, coverage_documents=5, **changes)


def test_evaluate_writes_and_resumes(card, model, tmp_path, monkeypatch, capsys):
    folder = tmp_path/"out"
    results = ev.evaluate(options(card, model, folder))
    assert {"base", "truth", "oracle", "nearest"} <= set(results)
    for f in ["report.html", "metadata.jsonl", "metrics.eval.jsonl", "results/base.json", "raw_results/base/next_sentence.jsonl", "raw_results/base/continuation.jsonl", "tb/base"]:
        assert (folder/f).exists(), f
    assert "pool of 240 sentences" in capsys.readouterr().out
    lines = [json.loads(x) for x in (folder/"raw_results/base/next_sentence.jsonl").read_text().splitlines()]
    assert len(lines) == 240 and lines[0]["position"] == 1
    assert np.mean([x["metrics"]["l2"] for x in lines]) == pytest.approx(results["base"]["l2"], abs=1e-5)
    asked = []
    judge = ev.Tasks.judge
    monkeypatch.setattr(ev.Tasks, "judge", lambda self, p: asked.append(p) or judge(self, p))
    (folder/"results/nearest.json").unlink()       # as if interrupted before its end
    assert ev.evaluate(options(card, model, folder)) == results
    assert [type(p).__name__ for p in asked] == ["NearestContext"]
    ev.evaluate(options(card, model, folder, max_documents=20, baselines=["truth"]))
    assert len(asked) == 3                          # other settings: nothing is kept


def test_evaluate_errors(card, model, tmp_path):
    for match, opts in [("rougeL", options(card, model, tmp_path/"x", metrics=["rouge_L"])),
                        ("copy_last", options(card, model, tmp_path/"x", baselines=["copylast"])),
                        ("cats", options("catz", model, tmp_path/"x")),
                        ("train", options("cats=tran", model, tmp_path/"x")),
                        ("base", options(card, model + "e", tmp_path/"x"))]:
        with pytest.raises(UserError, match=match): ev.evaluate(opts)
    assert not (tmp_path/"x/results").exists()


def test_space_mismatch(card, model, tmp_path):
    from lcm_nb.models.lcm import load_lcm
    lcm = load_lcm(model, device="cpu"); lcm.space = "other@2"; lcm.save_pretrained(tmp_path/"models/other")
    with pytest.raises(UserError, match="other@2"): ev.evaluate(options(card, str(tmp_path/"models/other"), tmp_path/"x"))
    class Other(ToySpace): id = "other@2"
    globals()["Other"] = Other
    with pytest.raises(UserError, match="toy@1"): ev.evaluate(options(card, model, tmp_path/"x", space=f"{__name__}:Other"))
