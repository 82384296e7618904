"What the benchmarks share: the work, the models, the clock."
import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

WORK = json.loads((Path(__file__).parent / "work.json").read_text())


def options(about):
    "Command-line options; threads are set before torch is imported"
    p = argparse.ArgumentParser(description=about)
    p.add_argument("--threads", type=int, default=1, help="CPU threads")
    p.add_argument("--quick", action="store_true", help="one repeat of the smallest shapes, to see that it runs")
    p.add_argument("--device", default="cpu", help="cpu, or cuda (bf16 there)")
    p.add_argument("--only", default="", help="run only the cases whose name contains this")
    args = p.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(args.threads)
    import torch
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def config_of(family):
    "The configuration of the work for a family"
    from lcm_nb.models.config import BaseLCMConfig, NoiseScheduleConfig, TransformerConfig, TwoTowerLCMConfig
    m = WORK["model"]
    stack = lambda layers, **kw: TransformerConfig(layers=layers, heads=m["num_attn_heads"], ffn_dim=m["ffn_inner_built"], dropout=m["dropout_p"], **kw)
    sizes = dict(concept_dim=m["sonar_embed_dim"], dim=m["model_dim"], max_len=m["max_seq_len"])
    if family == "base": return BaseLCMConfig(**sizes, decoder=stack(m["base_lcm"]["num_layers"]))
    t = m["two_tower"]
    return TwoTowerLCMConfig(**sizes, encoder=stack(t["context_encoder_layers"]), denoiser=stack(t["denoiser_layers"], positions="none"),
                             schedule=NoiseScheduleConfig(steps=t["num_diffusion_train_steps"]), guidance_dropout=WORK["training"]["cf_guidance_probability"])


def model_of(family, device):
    "A model with random weights, gates included, and the normalizer of the work"
    import torch
    from lcm_nb.models.lcm import build_lcm
    model = build_lcm(config_of(family))
    model.normalizer.scale.fill_(0.006)
    for name, p in model.named_parameters():
        if ".modulator." in name: torch.nn.init.normal_(p, std=0.02)
    return model.to(device)


def concepts(b, n, device):
    "Documents of the work"
    import torch
    from lcm_nb.data.batches import ConceptBatch
    x = torch.randn(b, n, WORK["model"]["sonar_embed_dim"]) * 0.006
    return ConceptBatch(x, torch.full((b,), n)).to(device)


def timed(f, warmup, repeats, device):
    "Median seconds of f()"
    import torch
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    out = []
    for i in range(warmup + repeats):
        wait(); start = time.perf_counter()
        f()
        wait(); out.append(time.perf_counter() - start)
    return statistics.median(out[warmup:]), out[warmup:]


def machine(args):
    "Where this was measured"
    import torch
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor()) if os.path.exists("/proc/cpuinfo") else platform.processor()
    name = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    return {"device": name, "threads": args.threads, "torch": torch.__version__, "python": platform.python_version(), "dtype": "bf16" if args.device == "cuda" else "fp32"}


def report(args, cases):
    "Print the result as JSON"
    json.dump({"machine": machine(args), "cases": cases}, sys.stdout, indent=1)
    print()
