"""Seconds and concepts per second of training steps. Prints JSON.

python benchmarks/train.py [--threads N] [--quick] [--device cuda] [--only NAME]

A step is forward, backward, clipping and AdamW. `ceiling` is the ratio of operations: the reference implementation's
over ours for the same batch.
"""
from common import WORK, concepts, config_of, model_of, options, report, timed


def step_of(model, batch, device):
    "One training step as a function"
    import torch
    from lcm_nb.core.device import autocast
    opt = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), 1e-5, 0.1, fused=True)
    def step():
        with autocast(device, "bf16" if device == "cuda" else "no"): l = model.loss(batch)
        (l.sum / l.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 25.)
        opt.step()
        opt.zero_grad()
    return step


def main():
    args = options(__doc__.split("\n")[0])
    from lcm_nb.core.flops import training_flops
    w, cases = WORK["training"], []
    shapes = w["shapes"][:1] if args.quick else w["shapes"]
    warmup, repeats = (0, 1) if args.quick else (w["warmup"], w["repeats"])
    for family in ("base", "two_tower"):
        if args.only not in family: continue
        model, config = model_of(family, args.device).train(), config_of(family)
        for shape in shapes:
            b, n = shape["batch_size"], shape["seq_len"]
            step = step_of(model, concepts(b, n, args.device), args.device)
            seconds, all_seconds = timed(step, warmup, repeats, args.device)
            ours, theirs = (b * n * training_flops(config, n, b, s) for s in (True, False))
            cases.append({"model": family, "batch_size": b, "seq_len": n, "seconds": seconds, "concepts_per_s": b * n / seconds,
                          "gflops_per_s": ours / seconds / 1e9, "ceiling": theirs / ours, "all_seconds": all_seconds})
    report(args, cases)


if __name__ == "__main__": main()
