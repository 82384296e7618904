"""Sentences a second of a full-size SONAR encoder with random weights, and its share of the machine's matrix products. Prints JSON.

python benchmarks/sonar_encoder.py [--device cuda] [--peak 790] [--quick]

24 layers, 1024 wide, 256,206 tokens; bf16 on a GPU. Sentences are token ids of mixed length (27 on average), sorted and
packed into batches of a token budget as the space does; tokenization is not in it. A product of two large matrices,
timed in the same run, is the ceiling; `--peak` gives another one in TFLOP/s.
"""
import argparse
import json
import random

from common import machine, timed


def encoder(layers, width, vocabulary, device, dtype):
    "A `SonarEncoder` of random weights"
    import torch
    from lcm_nb.concepts.sonar import SonarEncoder
    from transformers import M2M100Config
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder
    config = M2M100Config(vocab_size=vocabulary, d_model=width, encoder_layers=layers, encoder_attention_heads=width // 64, encoder_ffn_dim=8 * width, max_position_embeddings=514,
                          encoder_layerdrop=0., scale_embedding=True, activation_function="relu")
    with torch.device(device): model = M2M100Encoder(config)
    return SonarEncoder(model.to(dtype).eval())


def ceiling(device, dtype, n):
    "FLOP/s of a product of two n × n matrices"
    import torch
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / timed(lambda: a @ b, 3, 10, device)[0]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--sentences", type=int, default=20_000)
    p.add_argument("--budgets", type=int, nargs="+", default=[8192, 16384, 32768, 65536], help="tokens in a batch")
    p.add_argument("--peak", type=float, help="TFLOP/s of the machine; measured if it is not given")
    p.add_argument("--quick", action="store_true", help="a small encoder, to see that it runs")
    args = p.parse_args()
    import torch
    from lcm_nb.concepts.sonar import END, PAD
    from lcm_nb.concepts.space import in_batches, padded
    torch.set_num_threads(args.threads)
    layers, width, vocabulary = (2, 128, 1000) if args.quick else (24, 1024, 256_206)
    n, budgets = (200, [512]) if args.quick else (args.sentences, args.budgets)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model, rng = encoder(layers, width, vocabulary, args.device, dtype), random.Random(0)
    rows = [[rng.randrange(4, vocabulary) for _ in range(min(120, 3 + int(rng.expovariate(1 / 23))))] + [END] for _ in range(n)]
    sizes = [len(r) for r in rows]
    inside = layers * (4 * width**2 + 2 * width * 8 * width)
    work = sum(2 * inside * s + layers * 4 * width * s * s for s in sizes)
    peak = args.peak * 1e12 if args.peak else ceiling(args.device, dtype, 1024 if args.device == "cpu" else 8192)
    out = {"machine": machine(args), "parameters in layers": inside, "sentences": n, "tokens on average": round(sum(sizes) / n, 1), "ceiling, TFLOP/s": round(peak / 1e12, 2), "budgets": {}}
    with torch.inference_mode():
        run = lambda budget: torch.stack(in_batches(lambda b: model(padded(b, PAD, args.device)), rows, sizes, budget)).cpu()
        for budget in budgets:
            seconds, _ = timed(lambda: run(budget), 1, 1 if args.quick else 3, args.device)
            out["budgets"][budget] = {"sentences per second": round(n / seconds, 1), "TFLOP/s": round(work / seconds / 1e12, 3), "share of the ceiling": round(work / seconds / peak, 3)}
    print(json.dumps(out, indent=1))


if __name__ == "__main__": main()
