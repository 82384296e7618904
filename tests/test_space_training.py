"Training a space from files of text, and SONAR further: the same from anywhere, in any number of processes, and every bad file named in one sentence."
import contextlib
import gzip
import json
import shutil
import socket
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from test_distributed import launch, losses
from toys import ENV, finish, lcm_nb

from lcm_nb.concepts.mini import MiniData, MiniSpace, load_mini
from lcm_nb.concepts.sonar import UNKNOWN, SonarTokenizer
from lcm_nb.concepts.space import load_space
from lcm_nb.training import spaces
from lcm_nb.training.spaces import Rows, TextData, SonarTraining, SonarTuning, learn_vocabulary, mini_coding, read_rows, space_run, write_rows
from lcm_nb.core.errors import UserError
from lcm_nb.training.checkpoints import step_directories
from lcm_nb.training.recipes import SpaceObjective, SpaceRecipe, recipe
from lcm_nb.training.run import run_recipe
from lcm_nb.worlds.stories import StoryWorld

SONAR = ROOT / "tests" / "fixtures" / "golden" / "sonar_tiny" # has few letters, and sentences that lack them are left out
SHAPE = {"dim": 32, "width": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "ffn": 2, "max_length": 60}
TINY = {"training.log_every": 5, "training.schedule.warmup": 5}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    "A folder of files: English and German side by side, French alone, and what the toy SONAR can spell"
    folder, world = tmp_path_factory.mktemp("text"), StoryWorld()
    events = list(dict.fromkeys(world.random_events(500, seed=2)))
    told = {lang: [world.tell(e, lang) for e in events] for lang in world.languages}
    (folder / "pairs.tsv").write_text("en\tdeu_Latn\n" + "".join(f"{a}\t{b}\n" for a, b in zip(told["eng_Latn"][:300], told["deu_Latn"])))
    for lang, name in (("eng_Latn", "a.en"), ("deu_Latn", "a.de")): (folder / name).write_text("\n".join(told[lang][:300]) + "\n")
    (folder / "fr.txt").write_text("\n".join(told["fra_Latn"][300:]) + "\n")
    rows = [{"eng_Latn": a, "deu_Latn": b} for a, b in zip(told["eng_Latn"], told["deu_Latn"])]
    with gzip.open(folder / "pairs.csv.gz", "wt") as f: f.write("de,en\n" + "".join('"{deu_Latn}","{eng_Latn}"\n'.format(**{k: s.replace('"', '""') for k, s in r.items()}) for r in rows[:300]))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:300]))
    pq.write_table(pa.Table.from_pylist(rows[:300]), folder / "pairs.parquet")
    tokenizer = SonarTokenizer(SONAR / "sentencepiece.model", ["deu_Latn", "eng_Latn"])
    spelled = [[s for s in told[lang] if UNKNOWN not in tokenizer.pieces([s])[0]] for lang in ("eng_Latn", "deu_Latn")]
    (folder / "spelled.tsv").write_text("eng_Latn\tdeu_Latn\n" + "".join(f"{a}\t{b}\n" for a, b in zip(spelled[0], spelled[1]*9)))
    return folder


@pytest.fixture(scope="module")
def sonar_tiny(): return SONAR


def plain(run_dir): return [{k: v for k, v in line.items() if "second" not in k} for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())]


# files

def test_every_kind_of_file_gives_the_same_rows(text):
    rows = list(read_rows(f"{text}/pairs.tsv"))
    assert len(rows) == 300 and list(rows[0]) == ["eng_Latn", "deu_Latn"]
    for spec in (f"en:{text}/a.en,de:{text}/a.de", f"{text}/pairs.jsonl", f"{text}/pairs.parquet", f"{text}/pairs.csv.gz"): assert list(read_rows(spec)) == rows


BAD = [("nowhere.tsv", None, "There is no file"), ("x.txt", "Hello.\n", "does not say its language"), ("eng_Latin:x.txt", "Hello.\n", 'Did you mean "eng_Latn"'),
       ("x.tsv", "en\tscore\nA.\t3\n", 'column "score" of .*x.tsv'), ("x.tsv", "id\ten\n1\tA.\n", 'column "id"'), ("x.tsv", "en\tde\nA.\tB.\tC.\n", "Line 2 of .*x.tsv"), ("x.tsv", "", "holds no text"),
       ("x.tsv", "en\teng_Latn\nA.\tB.\n", "x.tsv has the language eng_Latn twice, in the columns en and eng_Latn"), ("x.tsv", "en\ten\nA.\tB.\n", "twice"), ("x.jsonl", '{"en": "A."}\n{"en": "A.", "eng_Latn": "B."}\n', "twice"),
       ("x.csv", 'en,de\n"A.,B.\n', "Line 2 of .*x.csv is not CSV"), ("x.csv", "en,de\nA.,B.,C.\n", "Line 2 of .*x.csv has 3 cells"), ("eng_Latn:x.csv", "A.\n", "x.csv is a table"),
       ("en:x.txt.zst", b"(\xb5/\xfd", "x.txt.zst is packed in a way that is not read"), ("x.tsv.zip", b"PK", "packed"),
       ("en:x.txt", " \n\n", "holds no text"), ("en:x.txt", "Café".encode("latin-1"), "not UTF-8"), ("x.jsonl", '{"en": "A."}\n{"en"\n', "Line 2 of .*x.jsonl is not valid JSON"),
       ("x.jsonl", "[1]\n", "not a JSON object"), ("x.jsonl", '{"en": 3}\n', "holds 3, which is not text"), ("x.parquet", "PAR1", "not a parquet file")]

@pytest.mark.parametrize("spec, content, says", BAD)
def test_bad_files(tmp_path, monkeypatch, spec, content, says):
    monkeypatch.chdir(tmp_path)
    if content is not None: (tmp_path / spec.split(":")[-1]).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says): run_recipe(recipe("space", text=[spec], run_dir="run"))
    assert not (tmp_path / "run" / "text").exists() and not (tmp_path / "run" / "config_logs").exists()


def test_files_that_are_not_aligned(text):
    with pytest.raises(UserError, match="are not aligned: .*fr.txt ends after"): list(read_rows(f"en:{text}/a.en,fr:{text}/fr.txt"))


def test_bad_recipes(text, tmp_path):
    def fails(says, **changes):
        with pytest.raises(UserError, match=says): space_run(recipe("space", **{"text": [f"{text}/pairs.tsv"], **changes}), tmp_path / says)
    fails("multiple of heads", **{"shape.heads": 7})
    fails('"widht"', shape={"widht": 64})
    fails("at least", vocabulary_size=50, shape=SHAPE)
    fails("translation alone", **{"text": [f"fr:{text}/fr.txt"], "vocabulary_size": 400, "shape": SHAPE, "objective.autoencoding": 0., "objective.denoising": 0.})
    fails("--init-from", decoder_only=True)
    fails("the language spa_Latn", text=[f"es:{text}/fr.txt"], init_from="mini")
    fails("None of the 193 sentences", text=[f"de:{text}/fr.txt"], init_from="mini")
    for name, value in {"width": 64, "heads": 2}.items(): fails("keeps its shape", init_from="mini", **{f"shape.{name}": value})
    fails("keeps its shape", init_from=str(SONAR), **{"shape.width": 64})
    fails('no field "mean_weight"', init_from=str(SONAR), mean_weight=1.)


# what the story world's space was trained with stays

def test_loss_of_the_story_world_is_what_it_was():
    "Recorded before text, dropout and objectives came: `space_mini` trains to the same numbers"
    mini = load_mini().requires_grad_(True).train()
    batch = MiniData(StoryWorld(), seed=1, pairs=32, vocabulary=mini.vocabulary, stories=50).batch(0)
    torch.manual_seed(7)
    losses = mini.loss(batch)
    assert losses.count == 627 and losses.sum.item() == pytest.approx(12.552006721496582, rel=1e-5)
    losses.sum.backward()
    assert sum(p.grad.double().square().sum() for p in mini.parameters()).item() == pytest.approx(6886.421627315901, rel=1e-4)
    assert mini.id == "mini@0a9033b4"


# batches

@pytest.fixture(scope="module")
def data(text, tmp_path_factory):
    path, specs = tmp_path_factory.mktemp("rows") / "rows.arrow", [f"{text}/pairs.tsv", f"fr:{text}/fr.txt"]
    coding = mini_coding(learn_vocabulary(SpaceRecipe(text=specs, vocabulary_size=400)), 60)
    write_rows(path, (r for s in specs for r in read_rows(s)), coding)
    return lambda **how: TextData(Rows(path), coding, **{"objective": SpaceObjective(), "dim": 8, "seed": 3, "pairs": 16} | how)


def test_a_batch_is_a_function_of_seed_and_number(data):
    one, other = data(), data()
    for k in (40, 3, 7): other.batch(k) # in another order
    for k in (3, 40):
        for a, b in zip(vars(one.batch(k)).values(), vars(other.batch(k)).values()): assert torch.equal(a, b)
    assert not torch.equal(one.batch(3).noise, data(seed=4).batch(3).noise)


def test_rows_of_one_language_are_never_translated(data):
    batches = [data().batch(k) for k in range(12)]
    alone = [b.ids[:, 1, 0] == 0 for b in batches]
    assert any(a.any() for a in alone) and not all(a.all() for a in alone)
    for b, a in zip(batches, alone):
        assert torch.equal(b.ids[a, 0, 0], b.target[a, 0, 0]) and not b.same[a].any() and b.same[~a].all() and (b.target[a, 1] == 0).all()


def test_objectives(data):
    def share(**odds): # of views that are written in the language that was read; of those read as they are
        got = [(b.ids[..., 0] == b.target[..., 0], b.same, b.ids[:, 1, 0] != 0) for b in (data(objective=SpaceObjective(**odds)).batch(k) for k in range(24))]
        kept, same, paired = (torch.cat(x) for x in zip(*got))
        return kept[paired].float().mean().item(), same[paired].float().mean().item()
    assert share(autoencoding=1., translation=0.) == (1., 1.)
    assert share(autoencoding=1., translation=3.)[0] == pytest.approx(.25, abs=.06)
    kept, same = share(autoencoding=1., translation=1., denoising=2.)
    assert kept == pytest.approx(.75, abs=.06) and same == pytest.approx(.25, abs=.06)


def test_translation_alone_of_rows_that_lost_a_side(text, tmp_path, capsys):
    "A side that is too long leaves a row of one language, which has nothing to be translated to"
    (tmp_path / "pairs.tsv").write_text((text / "pairs.tsv").read_text() + "Hello.\t" + "Guten Tag. "*60 + "\n")
    r = small(text, tmp_path / "run", text=[f"{tmp_path}/pairs.tsv"], **{"objective.autoencoding": 0., "objective.denoising": 0., "validation_share": 0.})
    _, data, _ = space_run(r, tmp_path / "run")
    assert "301 rows to train on" in (said := capsys.readouterr().out) and "1 of 602 sentences left out" in said and "1 rows not drawn" in said
    assert (len(data.rows), data.size) == (301, 300)
    for k in range(40): assert (b := data.batch(k)).same.all() and (b.ids[..., 0] != b.target[..., 0]).all()


# preparing

def test_languages_that_come_up_late(text, tmp_path):
    "A table ordered by language: every language is in the space, and its pieces are of all"
    english, french = ([{"eng_Latn": "It rains."}]*3000, [{"fra_Latn": s} for s in (text / "fr.txt").read_text().splitlines()])
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(r) + "\n" for r in english + french))
    r = SpaceRecipe(text=[f"{tmp_path}/all.jsonl"], vocabulary_size=400)
    one, other = learn_vocabulary(r, most=500), learn_vocabulary(r, most=500)
    assert one.languages == ["eng_Latn", "fra_Latn"] and one.model == other.model
    only_first = spaces.train_vocabulary(["It rains."]*500, [], 400)
    sentence = french[50]["fra_Latn"]
    assert len(one.encode(sentence, "fra_Latn")) < len(only_first.processor.encode(sentence))


WAITING = """
import os, time, torch.distributed as dist
from datetime import timedelta
from accelerate import Accelerator
from lcm_nb.training.spaces import main_first
Accelerator()
dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD) # the usual patience, but shorter
with main_first() as main:
    if main: time.sleep(6)
    else: print("waited")
with main_first() as main:
    if main: os._exit(9)
"""

def test_others_wait_as_long_as_it_takes_but_for_none_that_died():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = ENV | {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [subprocess.Popen([sys.executable, "-c", WAITING], env=env | {"RANK": str(i), "LOCAL_RANK": str(i)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i in range(2)]
    (main, _), (other, out) = (finish(p) for p in both)
    assert (main, other) == (9, 1) and "waited" in out and "its own message says why" in out


def test_only_one_process_reads_the_text(text, tmp_path, monkeypatch):
    r = small(text, tmp_path)
    spaces.prepare_text(r, tmp_path / "text", max_length=60)
    monkeypatch.setattr(spaces, "main_first", lambda: contextlib.nullcontext(False))
    monkeypatch.setattr(spaces, "text_lines", None)
    monkeypatch.setattr(spaces, "sha256", None)
    assert spaces.shared_text(r, tmp_path / "text", max_length=60).languages == ["deu_Latn", "eng_Latn", "fra_Latn"]


def test_text_that_cannot_be_prepared_ends_all_processes(text, tmp_path):
    options = ["space", "--init-from", "mini", "--text", f"de:{text}/fr.txt", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(AssertionError, match="None of the 193 sentences"): launch(*options)


# training from text

def small(folder, run_dir, **changes):
    return recipe("space", **{"text": [f"{folder}/pairs.tsv", f"fr:{folder}/fr.txt"], "vocabulary_size": 400, "pairs": 16, "validation_share": .1, "shape": SHAPE, "run_dir": str(run_dir),
                              "training.max_steps": 20, "training.checkpoint_every": 10, "training.validate_every": 10, **TINY, **changes})


def test_resume_is_exact(text, tmp_path):
    run_recipe(small(text, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_20")
    run_recipe(small(text, tmp_path / "cut"))
    assert plain(tmp_path / "whole") == plain(tmp_path / "cut")
    whole, cut = (load_mini(tmp_path / d / "checkpoints" / "step_20") for d in ("whole", "cut"))
    assert whole.id == cut.id and all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), cut.state_dict().values()))


def test_text_that_changed_is_noticed(text, tmp_path):
    shutil.copy(text / "fr.txt", tmp_path / "fr.txt")
    changing = small(text, tmp_path / "run", text=[f"fr:{tmp_path}/fr.txt"], **{"training.max_steps": 1})
    run_recipe(changing)
    (tmp_path / "fr.txt").write_text("Autre chose.\n")
    with pytest.raises(UserError, match="made from other text"): run_recipe(changing)


def test_space_that_exists_by_the_recipe_for_text(text, tmp_path):
    "A shipped space, then the run itself; shape, vocabulary and licence stay"
    code, out = finish(lcm_nb("train", "space", "--init-from", "mini", "--text", f"{text}/pairs.tsv", "--license", "CC0", "--run-dir", tmp_path / "one",
                              "--pairs", "8", "--training.max-steps", "2"))
    assert code == 0, out
    one = load_mini(tmp_path / "one" / "checkpoints" / "step_2")
    assert (one.config.width, one.config.noise, one.config.dropout, one.license) == (128, .3, .1, "MIT; text: CC0") and one.vocabulary.key == load_mini().vocabulary.key
    run_recipe(recipe("space", init_from=str(tmp_path / "one"), text=[f"{text}/pairs.tsv"], run_dir=str(tmp_path / "two"), dropout=.2, pairs=8, **{"training.max_steps": 2}))
    two = load_mini(tmp_path / "two" / "checkpoints" / "step_2")
    assert (two.config.dropout, two.license) == (.2, one.license) and two.id != one.id


def test_run_without_a_checkpoint(tmp_path):
    (tmp_path / "run" / "config_logs").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint yet"): space_run(SpaceRecipe(init_from=f"{tmp_path}/run"), tmp_path)


def test_id_names_weights_and_vocabulary(text, tmp_path):
    vocabularies = [learn_vocabulary(SpaceRecipe(text=[f"{text}/pairs.tsv"], vocabulary_size=n)) for n in (400, 401)]
    ids = set()
    for v in (*vocabularies, vocabularies[0]):
        torch.manual_seed(0)
        ids.add(MiniSpace(load_mini().config, v).weights_id())
    assert len(ids) == 2


def test_any_size(text, tmp_path):
    model, data, _ = space_run(small(text, tmp_path, shape=SHAPE | {"dim": 1024, "width": 48, "heads": 6, "encoder_layers": 3}), tmp_path)
    losses = model.loss(data.batch(0))
    losses.sum.backward()
    assert model.concepts(data.batch(0).ids[:, 0]).shape == (16, 1024) and all(p.grad is not None for p in model.parameters())


def test_noise_alone_changes_a_decoder_and_not_the_space(text, tmp_path):
    "`mini` on text of its own world: only rows that it can spell are taken"
    run_recipe(recipe("space_mini", init_from="mini", decoder_only=True, noise=1.2, text=[f"{text}/pairs.tsv"], pairs=8, run_dir=str(tmp_path), **{"training.max_steps": 2}))
    after, before = load_mini(tmp_path / "checkpoints" / "step_2"), load_mini()
    assert after.id == before.id and not torch.equal(after.from_concept.weight, before.from_concept.weight)


# SONAR

def test_sonar_by_the_recipe_for_text(text, tmp_path):
    r = recipe("space", init_from=str(SONAR), text=[f"{text}/spelled.tsv"], pairs=8, validation_share=.1, license="CC0", run_dir=str(tmp_path), **{"training.max_steps": 1})
    run_recipe(r)
    assert json.loads((tmp_path / "checkpoints" / "step_1" / "config.json").read_text())["license"] == "CC-BY-NC-4.0 (published text weights); text: CC0"
    assert load_space(str(tmp_path / "checkpoints" / "step_1"), device="cpu").license == "CC-BY-NC-4.0 (published text weights); text: CC0"
    assert spaces.existing_model(SpaceRecipe(init_from=str(tmp_path))).space.id == load_space(str(tmp_path / "checkpoints" / "step_1"), device="cpu").id


def sonar_options(text, sonar_tiny, run_dir, steps=20, **more):
    options = {"--init-from": sonar_tiny, "--text": f"{text}/spelled.tsv", "--validation-share": 0.1, "--pairs": 7, "--run-dir": run_dir, "--training.max-steps": steps,
               "--training.checkpoint-every": 10, "--training.log-every": 5, "--training.precision": "no", "--training.lr": 0.003, "--training.schedule.warmup": 5, "--dropout": 0.0, **more}
    return ["finetune_sonar_decoder", *(str(x) for pair in options.items() for x in pair)]


@pytest.fixture(scope="module")
def tuned(text, sonar_tiny, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("sonar") / "run"
    code, out = finish(lcm_nb("train", *sonar_options(text, sonar_tiny, run_dir)))
    assert code == 0, out
    return run_dir


def test_sonar_decoder_learns_and_the_space_stays(tuned, sonar_tiny):
    curve = [line["cross_entropy"] for line in plain(tuned) if line["split"] == "train"]
    assert curve[-1] < curve[0] - .5
    before, after = load_space("sonar", sonar_tiny, device="cpu"), load_space(str(tuned / "checkpoints" / "step_20"), device="cpu")
    assert after.id == before.id and after.encoder.state_dict().keys() == before.encoder.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(after.encoder.state_dict().values(), before.encoder.state_dict().values()))
    assert not torch.equal(after.decoder.model.embed_tokens.weight, before.decoder.model.embed_tokens.weight)
    x = after.encode(["There was also a wild horse."], "en")
    assert torch.equal(x, before.encode(["There was also a wild horse."], "en")) and after.decode(x, "en", max_length=16) != before.decode(x, "en", max_length=16)


def test_sonar_resume_is_exact(tuned, text, sonar_tiny, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(tuned, cut)
    shutil.rmtree(cut / "checkpoints" / "step_20")
    code, out = finish(lcm_nb("train", *sonar_options(text, sonar_tiny, cut)))
    assert code == 0, out
    assert plain(cut) == plain(tuned)
    assert (cut / "checkpoints" / "step_20" / "model.safetensors").read_bytes() == (tuned / "checkpoints" / "step_20" / "model.safetensors").read_bytes()


def test_sonar_on_two_processes_is_one(tuned, text, sonar_tiny, tmp_path):
    out = launch(*sonar_options(text, sonar_tiny, tmp_path / "two"))
    assert "Training on 2 processes" in out
    one, two = losses(tuned), losses(tmp_path / "two")
    assert [line[:2] for line in one] == [line[:2] for line in two]
    assert [line[2] for line in two] == pytest.approx([line[2] for line in one], rel=1e-4)


def test_both_halves_of_sonar(text, sonar_tiny, tmp_path):
    "Translations come nearer, the encoder gets a new name, and a run goes on where it was"
    r = recipe("finetune_sonar_decoder", init_from=str(sonar_tiny), decoder_only=False, text=[f"{text}/spelled.tsv"], pairs=8, validation_share=.1, run_dir=str(tmp_path),
               **{"training.max_steps": 20, "training.gradient_accumulation": 1, "training.lr": .003, "training.precision": "no", "training.validate_every": 10, **TINY, "objective.translation": 1.})
    run_recipe(r)
    near = [line["translation_distance"] for line in plain(tmp_path) if line["split"] == "validation"]
    assert near[-1] < near[0]
    (_, step), = step_directories(tmp_path)
    after, before = load_space(str(step), device="cpu"), load_space("sonar", sonar_tiny, device="cpu")
    assert after.id != before.id and not torch.equal(after.encoder.model.layers[0].fc1.weight, before.encoder.model.layers[0].fc1.weight)


def test_shared_weights_are_not_trained_in_the_frozen_half(sonar_tiny):
    space = load_space("sonar", sonar_tiny, device="cpu")
    space.encoder.model.embed_tokens.weight.data = space.decoder.model.embed_tokens.weight.data
    training = SonarTraining(space, SonarTuning())
    with torch.no_grad(): training.decoder.embed_tokens.weight += 1
    assert not training.encoder.embed_tokens.weight.requires_grad and not torch.equal(training.encoder.embed_tokens.weight, training.decoder.embed_tokens.weight)
