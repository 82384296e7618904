"""Both SONAR backends on the same weights, and speech. Run by `make test-sonar`, which builds the environment of Meta's package."""
import json, math, os, signal, subprocess, sys, threading, time, warnings, wave
from pathlib import Path
import numpy as np, pytest, torch
from lcm_nb.concepts.space import load_space
from lcm_nb.core.errors import RecordingError, UserError
from tiny_sonar import SIZES, sentences, train_tokens
from toys import finish, lcm_nb

PYTHON = os.environ.get("LCM_NB_SONAR_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs the environment of sonar-space: make test-sonar")
TEXTS, THEIRS = sentences(), [2, 0, 3, 1] # ours -> fairseq2's first ids

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A small SONAR made by Meta's code"
    folder = tmp_path_factory.mktemp("sonar")
    train_tokens(folder, SIZES["pieces"], TEXTS*3)
    subprocess.run([PYTHON, "tests/tiny_sonar.py", folder, json.dumps(SIZES)], check=True)
    return folder

@pytest.fixture(scope="module")
def ours(folder): return load_space("sonar", folder, device="cpu")

@pytest.fixture(scope="module")
def theirs(folder): return load_space("sonar-space", folder, device="cpu", timeout=120)

@pytest.fixture(scope="module")
def concepts(ours):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ours.encode(TEXTS, "eng_Latn", check=False)

# the two backends

def test_one_space(ours, theirs):
    assert len(TEXTS) >= 200 and ours.id == theirs.id and ours.languages == theirs.languages and ours.dim == theirs.dim
    assert theirs.speech_languages == ["eng_Latn"] and ours.speech_languages == []
    assert theirs.coverage(TEXTS, "en") == ours.coverage(TEXTS, "en")

@pytest.mark.parametrize("lang", SIZES["languages"])
def test_embeddings(ours, theirs, lang):
    with warnings.catch_warnings(record=True) as ours_said: warnings.simplefilter("always"); a = ours.encode(TEXTS, lang)
    with warnings.catch_warnings(record=True) as theirs_said: warnings.simplefilter("always"); b = theirs.encode(TEXTS, lang)
    print(f"{lang}: embeddings of {len(TEXTS)} strings differ by {(a - b).abs().max():.1e}")
    assert (a - b).abs().max() <= 1e-5 and a.std() > .1
    assert [str(w.message) for w in ours_said] == [str(w.message) for w in theirs_said] != [] # empty and overlong texts, once

def test_logits(ours, theirs, concepts):
    ids = ours.tokenizer.target(TEXTS, "deu_Latn")
    for n in (3, 12, 40):
        rows = [i for i, r in enumerate(ids) if len(r) >= n]
        mine = torch.tensor([ids[i][:n] for i in rows])
        with torch.inference_mode(): a = ours.decoder(concepts[rows], mine)
        asked = torch.where(mine < 4, torch.tensor(THEIRS)[mine.clamp(max=3)], mine)
        b = torch.tensor(theirs.backend.call("logits", concepts=concepts[rows].numpy(), ids=asked.tolist()))
        b = b[..., [*THEIRS, *range(4, b.shape[-1])]]
        print(f"logits of {len(rows)} texts of {n} tokens differ by {(a - b).abs().max():.1e}")
        assert len(rows) >= 5 and (a - b).abs().max() <= 1e-4

@pytest.mark.parametrize("search", [dict(), dict(beam_size=1), dict(beam_size=3, len_penalty=.5, max_length=20), dict(beam_size=7, temperature=1.5, min_length=4),
                                    dict(unk_penalty=2., len_penalty=2., max_length=9)], ids=str)
def test_beams(ours, theirs, concepts, search):
    a, b = ours.hypotheses(concepts, "deu_Latn", **search), theirs.hypotheses(concepts, "deu_Latn", **search)
    assert [[h.ids for h in row] for row in a] == [[h.ids for h in row] for row in b]
    assert max(abs(p.score - q.score) for x, y in zip(a, b) for p, q in zip(x, y)) < 1e-4
    assert len({len(h.ids) for row in a for h in row}) > 2
    assert ours.decode(concepts, "deu_Latn", **search) == theirs.decode(concepts, "deu_Latn", **search)

def test_sampling(theirs, concepts):
    greedy = theirs.decode(concepts[:40], "en", beam_size=1, max_length=12)
    assert theirs.decode(concepts[:40], "en", sample=True, top_k=1, max_length=12) == greedy
    drawn = [theirs.decode(concepts[:40], "en", sample=True, max_length=12, seed=s) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    many = theirs.decode(concepts[:1].expand(130, -1), "en", sample=True, max_length=12)
    assert many[:64] != many[64:128] # batches draw differently
    with pytest.raises(UserError, match="top_k or with top_p"): theirs.decode(concepts[:1], "en", sample=True, top_k=3, top_p=.5)
    with pytest.raises(UserError, match="no lists of hypotheses"): theirs.hypotheses(concepts[:1], "en", sample=True)

def test_wrong_requests(theirs, concepts):
    with pytest.raises(UserError, match=r"\(n, 64\)"): theirs.decode(torch.zeros(2, 3), "en")
    with pytest.raises(UserError, match="jpn_Jpan"): theirs.encode(["Hei."], "fin_Latn")
    with pytest.raises(UserError, match="beam_size"): theirs.decode(concepts[:1], "en", beams=3)
    with pytest.raises(UserError, match="3 of 3"): theirs.encode(["word "*200, "a "*200, "b "*200], "en", strict=True)
    assert theirs.decode(concepts[:0], "en") == [] and theirs.encode([], "en").shape == (0, 64)

# inside its environment

def test_in_one_interpreter(folder):
    "In the environment of sonar-space both backends run in the process that asks"
    code = f"""
import sys; sys.path.insert(0, "tests")
import warnings; warnings.simplefilter("ignore")
from tiny_sonar import sentences
from lcm_nb.concepts.space import load_space
from lcm_nb.concepts.sonar_space import Here
a, b = load_space("sonar", {str(folder)!r}, device="cpu"), load_space("sonar-space", {str(folder)!r}, device="cpu")
assert isinstance(b.backend, Here)
x, y = a.encode(sentences(), "en", check=False), b.encode(sentences(), "en", check=False)
assert (x - y).abs().max() <= 1e-5
assert a.decode(x[:50], "en") == b.decode(x[:50], "en")
print("same", b.id)
"""
    env = {k: v for k, v in os.environ.items() if k != "LCM_NB_SONAR_PYTHON"}
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.startswith("same sonar@"), done.stderr[-2000:]

# speech

def tone(seconds, rate=16_000, seed=0):
    "Something like a voice: a gliding tone with overtones in all bands"
    t = np.arange(int(seconds*rate))/rate
    f = 120 + 60*np.sin(2*math.pi*(1 + seed % 3)*t)
    return (.2*sum(np.sin(2*math.pi*k*np.cumsum(f)/rate)/k for k in range(1, 41))).astype("f4")

def write_wav(path, samples, rate): # samples: (n,) or (n, channels)
    samples = samples.reshape(len(samples), -1)
    with wave.open(str(path), "wb") as w:
        w.setnchannels(samples.shape[1]); w.setsampwidth(2); w.setframerate(rate)
        w.writeframes((samples*32767).round().astype("<i2").tobytes())
    return str(path)

def test_files_and_arrays_sound_alike(theirs, tmp_path):
    x = tone(1.3)
    path = write_wav(tmp_path/"a.wav", x, 16_000)
    exact = (x*32767).round().astype("i2").astype("f4")/32768
    from_file, from_array = theirs.encode_speech([path, (exact, 16_000)], "eng_Latn")
    assert (from_file - from_array).abs().max() < 1e-4 and from_file.std() > .1
    assert (from_file - theirs.encode_speech([Path(path)], "en")[0]).abs().max() < 1e-5

def test_against_the_pipeline_itself(theirs, folder, tmp_path):
    "What `SpeechToEmbeddingModelPipeline` says of a file at 16 kHz"
    path = write_wav(tmp_path/"a.wav", tone(2.1, seed=4), 16_000)
    code = f"""
import json, sys, yaml, torch
from fairseq2.assets import AssetCard
from fairseq2.models import load_model
import sonar
from sonar.inference_pipelines.speech import SpeechToEmbeddingModelPipeline
card = next(c for c in yaml.safe_load_all(open({str(folder/'cards.yaml')!r})) if c["model_family"] == "sonar_speech")
model = load_model(AssetCard("s", card | {{"checkpoint": {str(folder/'speech.pt')!r}}}), device=torch.device("cpu"), progress=False)
print(json.dumps(SpeechToEmbeddingModelPipeline(model).predict([{path!r}]).tolist()))
"""
    wanted = json.loads(subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert (theirs.encode_speech([path], "en") - torch.tensor(wanted)).abs().max() < 1e-5

@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_rates_and_channels(rate, tmp_path):
    "Whatever a file's rate and channels, what is heard is the same sound at 16 kHz"
    t = lambda r: np.arange(int(1.5*r))/r
    sound = lambda r: .1*sum(np.sin(2*math.pi*f*t(r)) for f in (110, 440, 1000, 3100)).astype("f4")
    left_and_right = np.stack([1.5*sound(rate), .5*sound(rate)], 1) # their mean is the sound
    path = write_wav(tmp_path/"s.wav", left_and_right, rate)
    np.save(tmp_path/"array.npy", sound(rate))
    code = f"""
import numpy as np
from lcm_nb.concepts.sonar_worker import waveform
np.save({str(tmp_path/'heard.npy')!r}, np.stack([waveform(x)[0].numpy() for x in ({path!r}, [np.load({str(tmp_path/'array.npy')!r}), {rate}])]))
"""
    subprocess.run([PYTHON, "-c", code], check=True)
    wanted, heard = sound(16_000), np.load(tmp_path/"heard.npy")
    assert heard.shape == (2, len(wanted))
    assert np.abs(heard - wanted)[:, 200:-200].max() < 1e-2 # its ends apart; the loudest sample is 0.4

def test_a_resampled_sound_is_near(theirs):
    x, y, other = theirs.encode_speech([(tone(1.5), 16_000), (tone(1.5, 48_000), 48_000), (tone(1.5, seed=1), 16_000)], "en")
    assert (y - x).norm() < .15*(other - x).norm()

def test_order_does_not_matter(theirs, tmp_path):
    sounds = [(tone(.3 + .1*i, seed=i), 16_000) for i in range(19)]
    x = theirs.encode_speech(sounds, "en")
    order = np.random.default_rng(0).permutation(19).tolist()
    assert (theirs.encode_speech([sounds[i] for i in order], "en") - x[order]).abs().max() < 1e-5

def test_wrong_speech(theirs, tmp_path):
    (tmp_path/"no.wav").write_bytes(b"not a sound")
    with pytest.raises(UserError, match="no.wav is not a sound"): theirs.encode_speech([tmp_path/"no.wav"], "en")
    with pytest.raises(UserError, match="no recording"): theirs.encode_speech([tmp_path/"none.wav"], "en")
    with pytest.raises(UserError, match="0.013 s; SONAR hears from"): theirs.encode_speech([(tone(.0125), 16_000)], "en")
    with pytest.raises(UserError, match="90.000 s; SONAR hears from"): theirs.encode_speech([write_wav(tmp_path/"l.wav", tone(90), 16_000)], "en")
    with pytest.raises(UserError, match="sonar_speech_encoder_deu"): theirs.encode_speech([(tone(1), 16_000)], "de")
    with pytest.raises(UserError, match="brackets"): theirs.encode_speech("a.wav", "en")
    with pytest.raises(UserError, match="it hears arb"): theirs.encode_speech([(tone(1), 16_000)], "ace_Latn")
    with pytest.raises(RecordingError, match="0.000 s"): theirs.encode_speech([(np.zeros(0, "f4"), 44_100)], "en")
    assert len(theirs.encode_speech([(tone(.036), 16_000), (tone(80.9), 16_000)], "en")) == 2
    assert theirs.encode_speech([], "en").shape == (0, 64)

def test_from_speech_to_text(folder, tmp_path):
    "Recordings to concepts, a model trained on them, a spoken prompt continued in writing"
    for d in range(24):
        for s in range(4): write_wav(tmp_path/f"{d}_{s}.wav", tone(.3 + .05*s, seed=7*d + s), 16_000)
    (tmp_path/"talks.jsonl").write_text("".join(json.dumps({"id": str(d), "audio": [f"{d}_{s}.wav" for s in range(4)], "text": [f"Sentence {s} of talk {d}." for s in range(4)]}) + "\n" for d in range(24)))
    def run(*a):
        code, out = finish(lcm_nb(*a, cwd=tmp_path))
        assert code == 0, out
    run("prepare", "talks.jsonl", "--speech-column", "audio", "--space", f"sonar-space:{folder}", "--out", "talks", "--validation", "0.2", "--test", "0")
    run("train", "pretrain_base_mini", "--train", "talks/card.yaml=train", "--validation", "talks/card.yaml=validation", "--run-dir", "run", "--training.max-steps", "3", "--batch.source-suffix-text", "None")
    run("generate", "run", "--speech", "0_0.wav", "0_1.wav", "--space", f"sonar-space:{folder}", "--n", "2", "--lang", "deu_Latn", "--out", "said.jsonl")
    said = json.loads((tmp_path/"said.jsonl").read_text())
    assert said["prompt"] == "0_0.wav 0_1.wav" and said["lang"] == "deu_Latn" and len(said["sentences"]) == 2

# a process that can die

@pytest.fixture
def fresh(folder):
    space = load_space("sonar-space", folder, device="cpu", timeout=60)
    space.encode(["Hello."], "en")
    return space

def test_killed_between_two_calls(fresh):
    wanted, old = fresh.encode(["A fox."], "en"), fresh.backend.process
    old.send_signal(signal.SIGKILL); old.wait()
    with pytest.raises(UserError, match="was killed by SIGKILL"): fresh.encode(["A fox."], "en")
    assert (fresh.encode(["A fox."], "en") - wanted).abs().max() < 1e-6 and fresh.backend.process.pid != old.pid

def test_killed_during_a_call(fresh, concepts):
    process = fresh.backend.process
    threading.Timer(.3, process.send_signal, [signal.SIGKILL]).start()
    with pytest.raises(UserError, match="was killed by SIGKILL.*asked to"):
        while True: fresh.decode(concepts, "en")

def test_hanging(fresh):
    process = fresh.backend.process
    process.send_signal(signal.SIGSTOP)
    fresh.backend.timeout = 1.
    with pytest.raises(UserError, match="gave no answer for 1 s, asked to encode"): fresh.encode(["A fox."], "en")
    assert process.poll() is not None
    fresh.backend.timeout = 60.
    with pytest.raises(UserError, match="gave no answer for 1 s"): # more than a socket holds
        fresh.encode(["A fox."], "en"); fresh.backend.process.send_signal(signal.SIGSTOP); fresh.backend.timeout = 1.
        fresh.backend.call("decode", concepts=np.zeros((10_000, 64), "f4"), lang="eng_Latn", search={})

def test_interrupted(fresh, concepts):
    process = fresh.backend.process
    threading.Timer(.5, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        while True: fresh.decode(concepts, "en")
    assert process.poll() is not None and fresh.encode(["A fox."], "en").shape == (1, 64)

def test_it_ends_with_its_parent(folder):
    code = f"""
from lcm_nb.concepts.space import load_space
space = load_space("sonar-space", {str(folder)!r}, python={PYTHON!r}, device="cpu")
space.encode(["Hello."], "en"); print(space.backend.process.pid, flush=True)
import os, signal; os.kill(os.getpid(), signal.SIGKILL)
"""
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]: break
        time.sleep(.1)
    else: pytest.fail("the other process lives on")

def test_errors_over_there(folder, tmp_path):
    state = torch.load(folder/"decoder.pt", weights_only=True)["model"]
    torch.save({"model": {n: w for n, w in state.items() if "cross" not in n and n != "decoder.layers.0.ffn.inner_proj.bias"}}, tmp_path/"decoder.pt")
    for f in ("encoder.pt", "sentencepiece.model", "cards.yaml"): (tmp_path/f).write_bytes((folder/f).read_bytes())
    broken = load_space("sonar-space", tmp_path, device="cpu")
    with pytest.raises(UserError, match="sonar-space cannot decode: .*inner_proj") as e: broken.decode(torch.zeros(1, 64), "en")
    assert "Traceback" in str(e.value.__cause__)
    with pytest.raises(UserError, match="cannot start"): load_space("sonar-space", folder, device="nowhere").encode(["Hi."], "en")
    with pytest.raises(UserError, match="no sonar-space|cannot be started"): load_space("sonar-space", folder, python="/no/python").encode(["Hi."], "en")
    with pytest.raises(UserError, match="no SONAR at"): load_space("sonar-space", tmp_path.parent, tokenizer=folder/"sentencepiece.model")
