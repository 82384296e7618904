"""The same SONAR by both backends: sentences a second, and whether they say the same. Prints JSON.

LCM_NB_SONAR_PYTHON=…/bin/python python benchmarks/sonar_speed.py [--threads 1] [--sentences 2000] [--decode 200]

A SONAR of random weights, 6 layers, 512 wide, 8,000 pieces, reads and writes made-up sentences of 2 to 60 words. Meta's
pipelines run in their own environment, at their default batch size (5) and at the best of several, in turn with ours.
`make bench-sonar` builds both environments.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIZES = dict(pieces=8000, dim=512, layers=6, heads=8, ffn=2048, max_length=512, languages=["eng_Latn", "fra_Latn"], speech="eng")


def sentences(n, seed=0, more=14):
    "Made-up sentences of 2 to 60 words, `more` than 2 on average; words as frequent as Zipf says"
    rng = random.Random(seed)
    syllables = [c + v + e for c in "bdfghklmnprstvz" for v in "aeiou" for e in ("", "n", "r", "s", "l")]
    words = list({"".join(random.Random(i).choices(syllables, k=1 + i % 4)) for i in range(20_000)})
    words.sort()
    weights = [1 / (r + 3) for r in range(len(words))]
    lengths = [min(60, 2 + int(rng.expovariate(1 / more))) for _ in range(n)]
    return [" ".join(rng.choices(words, weights, k=k)).capitalize() + "." for k in lengths]


def theirs(folder, work):
    "In the environment of sonar-space: seconds for encoding at each batch size, or for decoding"
    import numpy as np
    import torch
    import yaml
    from fairseq2.assets import AssetCard
    from fairseq2.data.tokenizers import load_tokenizer
    from fairseq2.models import load_model
    import sonar  # noqa: F401  registers its models
    from sonar.inference_pipelines.text import EmbeddingToTextModelPipeline, TextToEmbeddingModelPipeline
    torch.set_num_threads(work["threads"])
    device = torch.device(work["device"])
    cards = {c["name"]: AssetCard(c["name"], c | {n: f"{folder}/{c[n]}" for n in ("checkpoint", "tokenizer") if n in c}) for c in yaml.safe_load_all(open(f"{folder}/cards.yaml"))}
    load = lambda name, kind: kind(load_model(cards[name], device=device, progress=False), load_tokenizer(cards[name], progress=False), device=device)
    out = {}
    if work["task"] == "encode":
        pipe = load("small_encoder", TextToEmbeddingModelPipeline)
        pipe.predict(work["texts"][:50], source_lang="eng_Latn")
        for name, how in work["batches"].items():
            start = clock(work)()
            x = pipe.predict(work["texts"], source_lang="eng_Latn", **how).float().cpu()
            out[name] = clock(work)() - start
        np.save(work["out"], x.numpy())
    else:
        pipe = load("small_decoder", EmbeddingToTextModelPipeline)
        x = torch.from_numpy(np.load(work["concepts"])).to(device)
        for name, how in work["batches"].items():
            start = clock(work)()
            texts = pipe.predict(x, target_lang="fra_Latn", beam_size=5, max_seq_len=work["max_length"], **how)
            out[name] = clock(work)() - start
        Path(work["out"]).write_text(json.dumps(texts))
    return out


def ask(folder, **work):
    "`theirs` in a process of the other environment"
    with tempfile.NamedTemporaryFile("w", suffix=".json") as f:
        json.dump(work, f)
        f.flush()
        env = {**os.environ, "OMP_NUM_THREADS": str(work["threads"])}
        done = subprocess.run([os.environ["LCM_NB_SONAR_PYTHON"], __file__, "--theirs", str(folder), f.name], capture_output=True, text=True, env=env)
    if done.returncode: raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def clock(work):
    "Seconds of the wall clock, or of this process"
    return time.process_time if work["cpu_time"] else time.perf_counter


def timed(f, work):
    "The value of f() and its seconds"
    start = clock(work)()
    value = f()
    return value, clock(work)() - start


def make(folder):
    "A SONAR of random weights"
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_sonar import train_tokens
    train_tokens(folder, SIZES["pieces"], sentences(60_000, seed=1))
    subprocess.run([os.environ["LCM_NB_SONAR_PYTHON"], ROOT / "tests" / "tiny_sonar.py", folder, json.dumps(SIZES)], check=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--theirs", nargs=2, help=argparse.SUPPRESS)
    p.add_argument("--folder", help="where the models are kept; made if it is not there")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--device", default="cpu")
    p.add_argument("--sentences", type=int, default=2000, help="to encode")
    p.add_argument("--words", type=float, default=14, help="words of a sentence on average, beyond the first two")
    p.add_argument("--decode", type=int, default=200, help="of them, to decode")
    p.add_argument("--max-length", type=int, default=64, help="tokens written at most")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--cpu-time", action="store_true", help="count the seconds of the process, not of the wall clock: for one thread on a busy machine")
    args = p.parse_args()
    if args.theirs:
        print(json.dumps(theirs(args.theirs[0], json.loads(Path(args.theirs[1]).read_text()))))
        return
    if not os.environ.get("LCM_NB_SONAR_PYTHON"): raise SystemExit("Set LCM_NB_SONAR_PYTHON to the interpreter of the environment with sonar-space (make bench-sonar does).")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import numpy as np
    import torch
    from lcm_nb.concepts.space import load_space
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.folder or f"{scratch}/sonar")
        if not (folder / "cards.yaml").exists(): make(folder)
        texts = sentences(args.sentences, more=args.words)
        space = load_space("sonar", folder, device=args.device, dtype="float32")
        tokens = [len(r) for r in space.tokenizer.source(texts, "eng_Latn")]
        common = dict(threads=args.threads, device=args.device, cpu_time=args.cpu_time)
        encoding = {"batch 5 (default)": {}, **{f"batch {b}": {"batch_size": b} for b in (16, 32, 64)},
                    **{f"{t} tokens": {"batch_size": None, "batch_max_tokens": t} for t in (500, 1000, 2000)}}
        decoding = {"batch 5 (default)": {}, **{f"batch {b}": {"batch_size": b} for b in (20, 60)}}
        quick = load_space("sonar", folder, device=args.device, dtype="bfloat16")
        rows, differences, same = {"encode": [], "decode": []}, [], []
        for _ in range(args.rounds):
            one = ask(folder, task="encode", texts=texts, batches=encoding, out=f"{scratch}/x.npy", **common)
            space.encode(texts[:50], "eng_Latn", check=False)
            x, one["ours"] = timed(lambda: space.encode(texts, "eng_Latn", check=False), common)
            y, one["ours in bf16"] = timed(lambda: quick.encode(texts, "eng_Latn", check=False), common)
            differences.append((x - torch.from_numpy(np.load(f"{scratch}/x.npy"))).abs().max().item())
            rows["encode"].append(one)
            np.save(f"{scratch}/c.npy", x[:args.decode].numpy())
            two = ask(folder, task="decode", concepts=f"{scratch}/c.npy", batches=decoding, out=f"{scratch}/t.json", max_length=args.max_length, **common)
            said, two["ours"] = timed(lambda: space.decode(x[:args.decode], "fra_Latn", max_length=args.max_length), common)
            roughly, two["ours in bf16"] = timed(lambda: quick.decode(x[:args.decode], "fra_Latn", max_length=args.max_length), common)
            same.append(sum(a == b for a, b in zip(said, json.loads(Path(f"{scratch}/t.json").read_text()))))
            rows["decode"].append(two)
        bf16 = {"lowest cosine": torch.cosine_similarity(x, y).min().item(), "same texts": f"{sum(a == b for a, b in zip(said, roughly))} of {args.decode}"}
    report(args, tokens, rows, differences, same, bf16)


def report(args, tokens, rows, differences, same, bf16):
    "Print the result as JSON"
    from common import machine
    out = {"machine": machine(args) | {"dtype": "fp32"}, "sentences": args.sentences, "tokens": {"mean": statistics.mean(tokens), "max": max(tokens)}, "largest difference": max(differences),
           "same texts": f"{min(same)} of {args.decode}", "bf16 against fp32": bf16}
    for task, n in (("encode", args.sentences), ("decode", args.decode)):
        seconds = {name: statistics.median(r[name] for r in rows[task]) for name in rows[task][0]}
        best = min((s, name) for name, s in seconds.items() if not name.startswith("ours"))
        out[task] = {"per second": {name: round(n / s, 2) for name, s in seconds.items()}, "ours / default": round(seconds["batch 5 (default)"] / seconds["ours"], 2),
                     "ours / best": round(best[0] / seconds["ours"], 2), "best": best[1], "bf16 / default": round(seconds["batch 5 (default)"] / seconds["ours in bf16"], 2)}
    print(json.dumps(out, indent=1))


if __name__ == "__main__": main()
