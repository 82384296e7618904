"""Seconds and concepts per second of generation. Prints JSON.

python benchmarks/generate.py [--threads N] [--quick] [--device cuda] [--only NAME]

`ceiling` is the ratio of operations: the reference implementation's (keys of the whole context and modulations anew in
every step, a full self-attention over one position) over ours, for the same steps.
"""
from common import WORK, concepts, config_of, model_of, options, report, timed


def work(config, n, batch, new, steps, guidance, savings):
    "Operations of a whole case: reading the prompts, then `new` concepts"
    from lcm_nb.core.flops import decoder_flops, flops, linear, plan_flops
    stack = config.decoder if config.family == "base_lcm" else config.encoder
    reading = n * (linear(config.concept_dim, config.dim) + decoder_flops(config.dim, stack, n))
    keys = 0 if config.family == "base_lcm" or not savings else n * config.denoiser.layers * 2 * linear(config.dim, config.dim)
    plan = plan_flops(config, steps) if savings and config.family != "base_lcm" else 0
    return batch * (reading + keys + sum(flops(config, n + i, steps, guidance, savings) for i in range(new))) + plan


def main():
    args = options(__doc__.split("\n")[0])
    import torch
    from lcm_nb.models.config import Sampling, Stopping
    w, cases = WORK["generation"], []
    lens = w["prompt_lens"][:1] if args.quick else w["prompt_lens"]
    warmup, repeats = (0, 1) if args.quick else (w["warmup"], w["repeats"])
    stopping = Stopping(max_length=w["max_gen_len"], eos_threshold=None)
    samplings = [("base", "base", Sampling())]
    for c in w["two_tower_cases"]:
        samplings.append(("two_tower", c["name"], Sampling(c["inference_timesteps"], c["guidance_scale"], c["guidance_rescale"], c["initial_noise_scale"], compat="reference")))
    for family, name, sampling in samplings:
        if args.only not in name: continue
        model = model_of(family, args.device).eval()
        if args.device == "cuda": model = model.to(torch.bfloat16)
        config = config_of(family)
        steps = len(model.plan(sampling).times) if family == "two_tower" else 0
        for n in lens:
            prompt = concepts(w["batch_size"], n, args.device)
            seconds, all_seconds = timed(lambda: model.generate(prompt, sampling, stopping), warmup, repeats, args.device)
            new = w["batch_size"] * w["max_gen_len"]
            ours, theirs = (work(config, n, w["batch_size"], w["max_gen_len"], steps, sampling.guidance_scale != 1, s) for s in (True, False))
            cases.append({"model": family, "case": name, "prompt_len": n, "steps_run": steps, "seconds": seconds, "concepts_per_s": new / seconds,
                          "gflops_per_s": ours / seconds / 1e9, "ceiling": theirs / ours, "all_seconds": all_seconds})
    report(args, cases)


if __name__ == "__main__": main()
