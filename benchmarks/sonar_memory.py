"""Peak memory of loading a SONAR checkpoint, in multiples of its size, above what the imports take. Prints JSON.

python benchmarks/sonar_memory.py [--gigabytes 1]

Beside `load_space("sonar")`, the usual way: build the model, read the file, copy. Each runs in a process of its own.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def peak():
    "Most bytes this process ever had in memory; `getrusage` would count what its parent had before"
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def make(folder, gigabytes):
    "An encoder of random weights with the published names, and a tokenizer"
    import sentencepiece
    import torch
    d, ffn, pieces = 1024, 8192, 100
    layers = max(1, round(gigabytes * 1e9 / 4 / (4 * d * d + 2 * d * ffn)))
    draw = lambda *shape: torch.randn(shape) * .02
    state = {"encoder_frontend.embed.weight": draw(pieces + 1 + 202 + 3, d), "layer_norm.weight": draw(d), "layer_norm.bias": draw(d)}
    for i in range(layers):
        shapes = {f"self_attn.{n}_proj": (d, d) for n in ("q", "k", "v", "output")} | {"ffn.inner_proj": (ffn, d), "ffn.output_proj": (d, ffn)}
        for name, shape in shapes.items(): state |= {f"encoder.layers.{i}.{name}.weight": draw(*shape), f"encoder.layers.{i}.{name}.bias": draw(shape[0])}
        for name in ("self_attn_layer_norm", "ffn_layer_norm"): state |= {f"encoder.layers.{i}.{name}.{w}": draw(d) for w in ("weight", "bias")}
    torch.save({"model": state}, f"{folder}/sonar_text_encoder.pt")
    text = (f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=text, model_prefix=f"{folder}/sentencepiece", vocab_size=pieces, model_type="bpe", unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)


def ours(folder):
    from lcm_nb.concepts.space import load_space
    from lcm_nb.concepts import sonar  # noqa: F401
    base = peak()
    space = load_space("sonar", folder, device="cpu")
    loaded = peak() - base
    space.encode(["bab dad " * 20] * 8, "eng_Latn", check=False)
    return {"loaded": loaded, "after encoding": peak() - base}


def usual(folder):
    import torch
    from lcm_nb.concepts.sonar import from_fairseq2
    from transformers import M2M100Config
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder
    base = peak()
    state = from_fairseq2(torch.load(f"{folder}/sonar_text_encoder.pt", weights_only=True)["model"])
    state = {n.removeprefix("encoder."): w for n, w in state.items()}
    layers = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("layers."))
    model = M2M100Encoder(M2M100Config(vocab_size=len(state["embed_tokens.weight"]), d_model=1024, encoder_layers=layers, encoder_attention_heads=16, encoder_ffn_dim=8192, max_position_embeddings=514))
    model.load_state_dict(state, strict=False)
    return {"loaded": peak() - base}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--gigabytes", type=float, default=1.)
    p.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.measure:
        print(json.dumps({"ours": ours, "usual": usual}[args.measure[0]](args.measure[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(folder, args.gigabytes)
        size = Path(f"{folder}/sonar_text_encoder.pt").stat().st_size
        out = {"file, GB": round(size / 1e9, 3)}
        for way in ("ours", "usual"):
            done = subprocess.run([sys.executable, __file__, "--measure", way, folder], capture_output=True, text=True, check=True)
            out[way] = {n: round(b / size, 2) for n, b in json.loads(done.stdout.splitlines()[-1]).items()}
    print(json.dumps(out, indent=1))


if __name__ == "__main__": main()
