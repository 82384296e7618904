"""Our models against numbers recorded from the reference implementation.

The folder comes from the environment variable LCM_GOLDEN (default tests/fixtures/golden). All sizes are read from it;
a piece that it lacks is skipped by name.
"""
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lcm_nb.core.errors import UserError
from lcm_nb.data.batches import ConceptBatch
from lcm_nb.models import diffusion as df
from lcm_nb.models.config import NormalizerConfig, Sampling, TimestepConfig, preset
from lcm_nb.models.lcm import build_lcm
from lcm_nb.models.normalizer import Normalizer, center_scale, from_fourier, to_fourier
from lcm_nb.models.reference import (config_from_reference, export_weights, import_weights, normalizer_config, reference_name,
                                     sampling_from_reference, schedule_config, stopping_from_reference)
from lcm_nb.models.transformer import sinusoid
from lcm_nb.models.two_tower import Draws, context_mask
from lcm_nb.core.config import replace


class Piece:
    "One recorded piece: its tensors, configuration and scalars"
    def __init__(self, folder, name):
        path = folder / f"{name}.json"
        if not path.exists(): pytest.skip(f"{folder} has no {name}")
        meta = json.loads(path.read_text())
        self.config, self.scalars = meta["config"], meta["scalars"]
        self.doc = {k: v.get("doc", "") for k, v in meta.get("tensors", {}).items()}
        tensors = folder / f"{name}.safetensors"
        self.t = load_file(tensors) if tensors.exists() else {}

    def under(self, prefix): return {k[len(prefix):]: v for k, v in self.t.items() if k.startswith(prefix)}


@pytest.fixture
def piece(golden): return lambda name: Piece(golden, name)


def near(got, want, rtol=1e-4, atol=1e-5): torch.testing.assert_close(got.float(), want.float(), rtol=rtol, atol=atol, equal_nan=True)


def model_of(piece, **changes):
    "Our model with the recorded configuration and weights"
    config = replace(config_from_reference(piece.config["model"], piece.config.get("normalizer")), **changes)
    model = build_lcm(config)
    import_weights(model, piece.under("state_dict/"))
    return model.eval()


def docs_of(t, *prefixes):
    "Recorded lists of vectors: in/doc_0, in/doc_1, …"
    named = lambda p: sorted((k for k in t if k.startswith(p) and k[len(p):].isdigit()), key=lambda k: int(k[len(p):]))
    lists = [[t[k] for k in named(p)] for p in prefixes]
    return [torch.cat(parts) for parts in zip(*lists)], [len(x) for x in lists[0]]


def batch_of(t, supervised=False):
    if not supervised: return ConceptBatch.from_list(docs_of(t, "in/doc_")[0])
    docs, sources = docs_of(t, "in/sup_source_", "in/sup_target_")
    return ConceptBatch.from_list(docs, source_lengths=sources)


def cases(golden, name, part, pattern):
    "The names of the recorded cases, for parametrize"
    path = golden / f"{name}.json"
    if not path.exists(): return ["absent"]
    says = json.loads(path.read_text())[part]
    nested = [f"{k}/{n}" for k, v in says.items() if isinstance(v, dict) for n in v]
    return list(dict.fromkeys(m[1] for k in (nested if part == "config" else says) if (m := re.fullmatch(pattern, k)))) or ["absent"]


CASES = {
    "base_loss": ("base_lcm", "scalars", "loss/(.*)"),
    "two_loss": ("two_tower_diffusion_lcm", "scalars", "loss/(.*)"),
    "share": ("two_tower_diffusion_lcm", "tensors", r"out/forward_cf([\d.]+)"),
    "base_case": ("base_lcm_generation", "scalars", "options/(.*)"),
    "two_case": ("two_tower_generation", "scalars", "options/(.*)"),
    "traced": ("two_tower_generation", "tensors", "trace/(.*)/latent_after_step"),
    "context": ("base_lcm_generation", "tensors", r"out/scorer_ctx(\d+)/.*"),
    "scored": ("two_tower_generation", "tensors", r"out/scorer_(.*)/pred_.*"),
    "variant": ("architecture_variants", "config", "((?:base|two_tower)/.*)"),
}


def pytest_generate_tests(metafunc):
    golden = Path(os.environ.get("LCM_GOLDEN", Path(__file__).parent / "fixtures" / "golden"))
    for fixture in CASES.keys() & set(metafunc.fixturenames):
        name, part, pattern = CASES[fixture]
        found = cases(golden, name, part, pattern)
        metafunc.parametrize(fixture, found)


def gradients(model, loss, piece, case):
    "Compare the recorded gradients, and their total norm"
    loss.backward()
    grads = {reference_name(k, model.config.family): p.grad for k, p in model.named_parameters()}
    for name, want in piece.under(f"grad/{case}/").items():
        near(grads[name], want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
    total = math.sqrt(sum(g.double().square().sum().item() for g in grads.values() if g is not None))
    assert total == pytest.approx(piece.scalars[f"grad_total_norm/{case}"], rel=1e-3)


# --- base model -----------------------------------------------------------------------------------------------------

def test_base_forward(piece):
    p = piece("base_lcm"); model, batch = model_of(p), batch_of(p.t)
    assert torch.equal(batch.mask, p.t["in/padding_mask"])
    x, m = model.normalize(batch.concepts), batch.mask
    near(x, p.t["mid/normalized_seqs"])
    near(model.input(x)[m], p.t["mid/frontend_out"][m])
    near(model.stack(model.input(x))[m], p.t["mid/decoder_out"][m])
    near(model.outputs(x)[m], p.t["out/forward"][m])
    near(model.outputs(x[:1]), p.t["out/forward_single_doc0"])
    near(model.predict(batch)[m], p.t["out/predict_next"][m])


def test_base_forward_f64(piece):
    p = piece("base_lcm"); model = model_of(p).double(); batch = batch_of(p.t)
    said = model.output(model.stack(model.input(p.t["mid/normalized_seqs"].double())))
    near(said[batch.mask], p.t["out/forward_f64"][batch.mask], rtol=1e-5, atol=1e-5)


def test_base_targets(piece):
    p = piece("base_lcm")
    assert torch.equal(model_of(p).targets(batch_of(p.t)), p.t["mask/target_mask_unsup"])
    for name, mask in p.under("mask/target_mask_unsup_minctx").items():
        assert torch.equal(model_of(p, min_context=int(name)).targets(batch_of(p.t)), mask)
    sup = batch_of(p.t, True)
    assert torch.equal(sup.mask, p.t["mask/sup_padding_mask"]) and torch.equal(model_of(p).targets(sup), p.t["mask/target_mask_sup"])


def test_base_loss(piece, base_loss):
    p, case = piece("base_lcm"), base_loss
    model = model_of(p, rmse="rmse1" in case, min_context=int(case.split("minctx")[1]) if "minctx" in case else 1)
    losses = model.loss(batch_of(p.t, case.startswith("sup")))
    assert int(losses.count) == p.scalars[f"num_target_elements/{case}"]
    value = losses.sum / losses.count if "mean" in case else losses.sum
    assert value.item() == pytest.approx(p.scalars[f"loss/{case}"], rel=1e-4)
    if f"grad_total_norm/{case}" in p.scalars: gradients(model, value, p, case)


# --- two-tower model ------------------------------------------------------------------------------------------------

def rows_dropped(order, p):
    "The recorded permutation as our mask of dropped positions"
    out = torch.zeros(len(order) + 1, dtype=torch.bool)
    out[order[:int(len(order) * p)] + 1] = True
    return out


def recorded_draws(p, case, supervised, share):
    "The draws of a recorded loss"
    t, kind = p.t, "in/sup_" if supervised else "in/"
    orders = [t[k] for k in sorted(t) if k.startswith(f"draw/randperm_loss_{case}_")]
    dropped = torch.stack([rows_dropped(o, share) for o in orders]) if orders else None
    return Draws(t[kind + "noise"], t[kind + "timesteps"], dropped)


def additive(mask): return torch.zeros(mask.shape).masked_fill(~mask, -math.inf)


def test_two_tower_forward(piece):
    p = piece("two_tower_diffusion_lcm"); model, batch, t = model_of(p), batch_of(p.t), p.t
    x, m = model.normalize(batch.concepts), batch.mask
    near(x, t["mid/normalized_seqs"])
    near(model.input(x)[m], t["mid/encoder_frontend_out"][m])
    context = model.encode(x)
    near(context[m], t["mid/context"][m])
    near(model.denoiser.time(t["in/timesteps"]), t["mid/timestep_embedding"])
    grid = t["mid/timestep_sinusoid_grid"]
    near(sinusoid(t["in/timesteps_grid"], grid.shape[1], first_cos=True, last=0), grid)
    noisy = df.mix(model.signal()[t["in/timesteps"]].unsqueeze(-1), x, t["in/noise"])
    near(noisy, t["mid/noisy_seqs"])


def test_two_tower_forward_f64(piece):
    p = piece("two_tower_diffusion_lcm"); t = p.t
    if "out/forward_cf0_f64" not in t: pytest.skip("no float64 record")
    model = model_of(p).double(); x, m = t["mid/normalized_seqs"].double(), t["in/padding_mask"]
    noisy = df.mix(model.signal()[t["in/timesteps"]].unsqueeze(-1).double(), x, t["in/noise"].double())
    mask = context_mask(torch.arange(x.shape[1]).unsqueeze(0), x.shape[1])
    near(model.denoise(noisy, t["in/timesteps"], model.encode(x), mask)[m], t["out/forward_cf0_f64"][m])


def test_two_tower_dropping(piece, share):
    "Forward passes in which a share of the positions sees no context"
    p = piece("two_tower_diffusion_lcm"); model, t = model_of(p), p.t
    x, m, order = t["mid/normalized_seqs"], t["in/padding_mask"], t.get(f"draw/randperm_cf{share}")
    dropped = None if order is None else rows_dropped(order, float(share)).unsqueeze(0)
    mask = context_mask(torch.arange(x.shape[1]).unsqueeze(0), x.shape[1], dropped)
    if f"mask/cross_additive_cf{share}" in t: assert torch.equal(additive(mask)[0, 0], t[f"mask/cross_additive_cf{share}"])
    near(model.denoise(t["mid/noisy_seqs"], t["in/timesteps"], model.encode(x), mask)[m], t[f"out/forward_cf{share}"][m])


def test_two_tower_denoise_in_generation(piece):
    p = piece("two_tower_diffusion_lcm"); model, batch = model_of(p), batch_of(p.t)
    context = model.encode(model.normalize(batch.concepts))
    mask = torch.nn.functional.pad(batch.mask, (1, 0), value=True)[:, None, None]
    near(model.denoise(p.t["in/infer_latent"], p.t["in/infer_timestep"], context, mask), p.t["out/denoise_inference"])


def test_two_tower_loss(piece, two_loss):
    p, case = piece("two_tower_diffusion_lcm"), two_loss
    supervised, share = case.startswith("supervised"), float(case.split("cf")[1].split("_")[0])
    changes = {"rmse": case.endswith("rmse")}
    for kind in ("epsilon", "v_prediction"):
        if case.startswith(kind): changes["schedule.prediction"] = kind
    if "clampsnr" in case: changes["times.weighting"] = "clamp_snr"
    if case.endswith("clampsnr_rmse"): changes.update({"times.min_gamma": .1, "times.max_gamma": 3.}) # not stated; these give it to 1e-7
    model, batch = model_of(p, **changes), batch_of(p.t, supervised)
    draws = recorded_draws(p, case, supervised, share)
    losses = model.loss(batch, draws)
    assert int(losses.count) == p.scalars[f"num_target_elements/{case}"]
    of = (lambda v: v / losses.count) if "mean" in case else (lambda v: v)
    assert of(losses.sum).item() == pytest.approx(p.scalars[f"loss/{case}"], rel=1e-4)
    assert of(losses.terms["mse"]).item() == pytest.approx(p.scalars[f"logged_mse_loss/{case}"], rel=1e-4)
    assert of(losses.terms["unnormalized_mse"]).item() == pytest.approx(p.scalars[f"logged_unnormalized_reconstruction_loss/{case}"], rel=1e-4)
    mask = p.t.get(f"mask/cross_additive_loss_{case}")
    if mask is not None:
        ours = additive(context_mask(model.queries(batch)[0], batch.concepts.shape[1], draws.dropped))
        if supervised: check_supervised_mask(ours, mask, model.queries(batch)[1])
        else: assert torch.equal(ours[0, 0], mask)
    if f"grad_total_norm/{case}" in p.scalars: gradients(model, of(losses.sum), p, case)


def check_supervised_mask(ours, theirs, real):
    "Equal for every real position; behind the row's end the reference masks by length"
    for b, row in enumerate(real):
        for i in row.nonzero().flatten(): assert torch.equal(ours[b, 0, i], theirs[b, 0, i])


def test_losses_by_time(piece):
    p = piece("two_tower_diffusion_lcm"); model, batch = model_of(p), batch_of(p.t)
    draws, real, said, true = model.errors(batch, recorded_draws(p, "sample_sum_cf0", False, 0))
    errors = (said - true).square().sum(-1)[real]
    labels = {k.rsplit("_t", 1)[1]: v for k, v in p.scalars.items() if k.startswith("logged_bucket/sample_sum_cf0_buckets/")}
    sums, _ = df.losses_by_time(errors, draws.times[real], model.config.schedule.steps, len(labels), compat="reference")
    near(sums, torch.tensor([labels[k] for k in sorted(labels, key=lambda s: int(s.split("-")[0]))]), rtol=1e-4, atol=1e-3)


def test_fast_modulation_is_exact(piece):
    p = piece("two_tower_diffusion_lcm"); model = model_of(p)
    times = torch.randint(model.config.schedule.steps, (3, model.config.schedule.steps))
    for fast, slow in zip(model.denoiser.modulations(times), model.denoiser.table(times)): near(fast, slow)


# --- generation -----------------------------------------------------------------------------------------------------

def recorded_noise(case, shapes, draws, prompt_lengths, out_lengths, per_concept, skip=0):
    """The recorded draws, in the order in which the reference consumed them, as a function of row and position.

    The reference starts at the shortest prompt's end and draws for all rows that have not ended.
    """
    at, start, table = 0, min(prompt_lengths), {}
    parts = []
    for _, shape in shapes:
        size = math.prod(shape)
        parts.append(draws[at:at + size].view(shape)); at += size
    parts, position = parts[skip:], start
    while parts:
        live = [r for r, n in enumerate(out_lengths) if n > position]
        for k in range(per_concept):
            part = parts.pop(0)
            assert part.shape[0] == len(live), (case, position, part.shape, live)
            for i, r in enumerate(live): table.setdefault((r, position), []).append(part[i, 0])
        position += 1
    return lambda row, position, n: torch.stack(table[row, position])


def check_generation(p, model, case, options, rtol=1e-4, atol=1e-4):
    "Generate with the recorded draws and compare"
    prompts = docs_of(p.t, "in/prompt_")[0]
    want, lengths = p.t[f"out/{case}/sequences"], p.t[f"out/{case}/lengths"].tolist()
    if "single" in case: # one prompt, or the beginning of one: the output begins with it
        n = lengths[0] - options["max_gen_len"]
        prompts = [next(q[:n] for q in prompts if len(q) >= n and torch.allclose(want[0, :n], q[:n]))]
    sampling, stopping = sampling_from_reference({"sample": False, **options}), stopping_from_reference(options)
    model.eos = p.t["in/eos_vec"] if options["eos_vec"] else None
    noise = None
    if f"draws/{case}" in p.scalars and "greedy" not in case:
        shapes = p.scalars[f"draws/{case}"]
        per = 1 + len(p.scalars.get(f"inference_timesteps/{case}", [])) * bool(options.get("ddim_eta"))
        ran = [n + (1 if options.get("trim_hypotheses") and n < len(q) + options["max_gen_len"] else 0) for n, q in zip(lengths, prompts)]
        prefill = int("sample" in options and min(map(len, prompts)) > 1) # the base model draws for its first pass too
        noise = recorded_noise(case, shapes, p.t[f"draws/{case}"], [len(q) for q in prompts], ran, per, prefill)
    made = model.generate(prompts, sampling, stopping, noise=noise)
    assert [len(q) + len(m) for q, m in zip(prompts, made)] == lengths
    for q, m, w in zip(prompts, made, want): near(torch.cat([q, m]), w[:len(q) + len(m)], rtol, atol)


def test_base_generation(piece, base_case):
    p, weights = piece("base_lcm_generation"), piece("base_lcm")
    check_generation(p, model_of(weights), base_case, p.scalars[f"options/{base_case}"])


def test_two_tower_generation(piece, two_case):
    p, weights = piece("two_tower_generation"), piece("two_tower_diffusion_lcm")
    options = p.scalars[f"options/{two_case}"]
    changes = {"schedule.prediction": options["prediction_type"]}
    if options.get("scheduler_overrides", {}).get("rescale_betas_zero_snr") is False: changes["schedule.zero_snr"] = False
    model = model_of(weights, **changes)
    times = model.plan(sampling_from_reference(options)).times
    assert times == p.scalars[f"inference_timesteps/{two_case}"]
    scale = p.t[f"out/{two_case}/sequences"].abs().max().item()
    check_generation(p, model, two_case, options, atol=1e-4 * max(1, scale))


def test_denoising_trace(piece, traced):
    "Latents and clean readings after every step of the first generated concept"
    case = traced
    p, weights = piece("two_tower_generation"), piece("two_tower_diffusion_lcm"); model = model_of(weights)
    sampling = sampling_from_reference(p.scalars[f"options/{case}"])
    prompts = docs_of(p.t, "in/prompt_")[0]
    shortest = min(map(len, prompts))
    state = model.start(ConceptBatch.from_list([q[:shortest] for q in prompts]))
    plan = state.plan(sampling)
    memory = [m.get(shortest + 1) for m in state.memory]
    denoise = model.denoiser_for(plan, memory, None, sampling)
    x = p.t[f"draws/{case}"][:len(prompts) * prompts[0].shape[1]].view(len(prompts), 1, -1) * sampling.initial_noise_scale
    for k, (abar, after) in enumerate(plan.levels):
        clean, eps = denoise(x, k)
        x = df.ddim_step(clean, eps, abar, after)
        near(clean, p.t[f"trace/{case}/pred_original"][k], atol=1e-4)
        near(x, p.t[f"trace/{case}/latent_after_step"][k], atol=1e-4)


def check_scorer(p, model, case, sampling, context, noise=None):
    "Teacher-forced predictions"
    prompts = docs_of(p.t, "in/prompt_")[0]
    said = model.predict(ConceptBatch.from_list(prompts), sampling, noise)
    for i, q in enumerate(prompts): near(said[i, context - 1:len(q) - 1], p.t[f"out/{case}/pred_{i}"], atol=1e-4)


def test_base_scorer(piece, context):
    p, weights = piece("base_lcm_generation"), piece("base_lcm")
    check_scorer(p, model_of(weights), f"scorer_ctx{context}", Sampling(), int(context))


def test_two_tower_scorer(piece, scored):
    p, weights = piece("two_tower_generation"), piece("two_tower_diffusion_lcm")
    case = f"scorer_{scored}"
    lengths = [len(q) for q in docs_of(p.t, "in/prompt_")[0]]
    table, at, position = {}, 0, 1
    for _, shape in p.scalars[f"draws/{case}"]:
        live = [r for r, n in enumerate(lengths) if n > position]
        part = p.t[f"draws/{case}"][at:at + math.prod(shape)].view(shape); at += math.prod(shape)
        for i, r in enumerate(live): table[r, position] = part[i]
        position += 1
    blank = torch.zeros(1, p.t["in/eos_vec"].shape[0])
    check_scorer(p, model_of(weights), case, sampling_from_reference(p.scalars[f"options/{scored}"]), 1, lambda row, position, n: table.get((row, position), blank))


def test_cached_equals_uncached(piece):
    "One concept at a time with caches, against reading the whole text again"
    for name in ("base_lcm", "two_tower_diffusion_lcm"):
        p = piece(name); model = model_of(p); prompts = docs_of(p.t, "in/doc_")[0]
        sampling = Sampling(steps=6, temperature=.2)
        fast = model.generate(prompts, sampling, n=4)
        for i, (doc, new) in enumerate(zip(prompts, fast)):
            for _ in range(4):
                said = model.predict(ConceptBatch.from_list([doc], ids=[str(i)]), sampling)
                doc = torch.cat([doc, said[0, -1:]])
            near(new, doc[-4:], rtol=1e-3, atol=1e-3)


# --- scheduler, normalizer, times -----------------------------------------------------------------------------------

def schedule_of(p, name):
    return schedule_config({**{k: v for k, v in p.config.items() if k != "tables"}, **p.config["tables"][name]})


def test_schedules(piece):
    p = piece("ddim_scheduler")
    for name in p.config["tables"]:
        config = schedule_of(p, name)
        abar = df.signal(config)
        near(abar, p.t[f"alphas_cumprod/{name}"], rtol=1e-5, atol=1e-6)
        betas = df.betas(config)
        near(df.zero_snr(betas) if config.zero_snr else betas, p.t[f"betas/{name}"], rtol=1e-5, atol=16 * torch.finfo().eps)
        snr, want = abar / (1 - abar), p.t[f"snr/{name}"]
        rounding = 4 * torch.finfo().eps * (1 + want).square() # four units in the last place of the signal, where it is near 1
        assert ((snr - want).abs() <= 1e-4 * want + 1e-6 + rounding).all() or not want.isfinite().all(), name


def test_raw_curves(piece):
    p = piece("ddim_scheduler")
    for name, want in p.under("betas/cosine_raw_T").items():
        every = int(re.search(r"every (\d+)", p.doc[f"betas/cosine_raw_T{name}"])[1])
        near(df.betas_from_curve(df.cosine_curve, int(name))[::every], want, rtol=1e-5, atol=1e-6)
    if "betas/exp_raw" in p.t:
        near(df.betas_from_curve(lambda u: torch.exp(-12 * u), len(p.t["betas/exp_raw"])), p.t["betas/exp_raw"], rtol=1e-5, atol=1e-6)


def test_grids(piece):
    p = piece("ddim_scheduler")
    for name, want in p.scalars["timesteps"].items():
        total, spacing, steps = name.split("/")
        total, steps = int(total[1:]), int(steps[1:])
        theirs = df.grid(total, steps, spacing, "reference")[0]
        if isinstance(want, dict): # long grids are recorded by their ends
            assert len(theirs) == want["len"] and theirs[:len(want["first"])] == want["first"] and theirs[-len(want["last"]):] == want["last"], name
            want = theirs
        assert theirs == want, name
        ours, after = df.grid(total, steps, spacing)
        assert len(ours) == len(after) == steps and ours == sorted(set(ours), reverse=True) and after[-1] == -1, name
        if spacing == "trailing" and total % steps == 0: assert ours == want, name


def step_of(p, name, stride):
    "One reference step, from the name of its record"
    table, zsnr, prediction, t, eta = name.split("/")
    abar, t = df.signal(schedule_of(p, f"{table}/{zsnr}")), int(t[1:])
    after = abar[t - stride] if t >= stride else torch.ones(())
    clean, eps = df.read(abar[t], p.t["in/sample"], p.t["in/model_output"], prediction)
    return clean, eps, df.ddim_step(clean, eps, abar[t], after, float(eta[3:]), p.t["in/variance_noise"])


def stride_of(p):
    "The stride of the recorded steps; the record does not state it"
    recorded = {k: v for k, v in p.under("step_prev/").items() if k.count("/") == 4 and "/t0/" not in k}
    for stride in range(1, p.config["num_diffusion_train_steps"]):
        if all(torch.allclose(step_of(p, k, stride)[2], v, rtol=1e-4, atol=1e-4 * v.abs().max()) for k, v in recorded.items()): return stride
    pytest.fail("no stride gives the recorded steps")


def test_steps(piece):
    p = piece("ddim_scheduler"); stride = stride_of(p)
    for name, want in p.under("step_prev/").items():
        if name.count("/") != 4: continue
        clean, eps, after = step_of(p, name, stride)
        # at the first times a step divides by differences from 1 that are a few units in the last place long
        for got, key in ((after, "step_prev"), (clean, "step_x0"), (eps, "get_epsilon")):
            if f"{key}/{name}" in p.t: near(got, p.t[f"{key}/{name}"], rtol=1e-5, atol=1e-5 * max(1, p.t[f"{key}/{name}"].abs().max().item()))


def test_step_options(piece):
    "Another stride, epsilon scaling, thresholding; the record does not say at which time: it must be one of them"
    p = piece("ddim_scheduler"); x, said, usual = p.t["in/sample"], p.t["in/model_output"], stride_of(p)
    abar = df.signal(schedule_of(p, "squaredcos_cap_v2/zsnr1"))
    for name, want in p.under("step_prev/").items():
        m = re.fullmatch(r"S(\d+)_sample|epsilon_scaling([\d.]+)|thresholding([\d.]+)_max([\d.]+)", name)
        if not m: continue
        stride = len(abar) // int(m[1]) if m[1] else usual
        def step(t):
            clean, eps = df.read(abar[t], x, 2 * said if m[3] else said)
            if m[2]: eps = eps / float(m[2])
            if m[3]: clean = df.threshold(clean, float(m[3]), float(m[4]))
            return df.ddim_step(clean, eps, abar[t], abar[t - stride] if t >= stride else torch.ones(()))
        assert any(torch.allclose(step(t), want, rtol=1e-5, atol=1e-5) for t in range(1, len(abar))), name


def test_forward_process(piece):
    p = piece("ddim_scheduler")
    for kind, f in (("add_noise", lambda a, x, e: df.mix(a, x, e)), ("get_velocity", lambda a, x, e: df.target(a, x, e, "v_prediction"))):
        for name, want in p.under(f"{kind}/").items():
            a = df.signal(schedule_of(p, name))[p.t["in/timesteps"]].unsqueeze(-1)
            near(f(a, p.t["in/x0"], p.t["in/noise"]), want, rtol=1e-5, atol=1e-6)


def test_variances(piece):
    "Of a step to the time before"
    p = piece("ddim_scheduler")
    for name, want in p.under("variances/").items():
        abar = df.signal(schedule_of(p, name))
        got = df.ddim_sigma(abar, torch.cat([torch.ones(1), abar[:-1]])) ** 2
        rounding = 8 * torch.finfo().eps / (1 - abar) # the variance is a ratio of two differences from 1
        close = (got - want).abs() <= 1e-4 * want.abs() + 1e-6 + rounding
        assert (close | want.isnan()).all(), name


def test_normalizer(piece):
    p = piece("normalizer")
    for name, case in p.config["cases"].items():
        config = normalizer_config(case)
        n = Normalizer.fit(p.t["in/fit_data"], config.method, **{k: getattr(config, k) for k in ("low", "high", "clip", "fft", "compat")})
        for buffer, value in n.state_dict().items(): near(value, p.t[f"fit/{name}/{buffer}"], rtol=1e-5, atol=1e-5)
        near(n.normalize(p.t["in/x"]), p.t[f"normalize/{name}"], rtol=1e-4, atol=1e-4)
        near(n.denormalize(p.t["in/z"]), p.t[f"denormalize/{name}"], rtol=1e-4, atol=1e-4)
        if f"roundtrip/{name}" in p.t: near(n.denormalize(n.normalize(p.t["in/x"])), p.t[f"roundtrip/{name}"], rtol=1e-4, atol=1e-4)


def test_right_quantiles_are_the_documented_ones(piece):
    "Our default is what the reference documents: the q25-75 cases"
    p = piece("normalizer")
    for name in p.config["cases"]:
        if not name.endswith("q25-75"): continue
        method, fft = name.split("/")[0], "fft1" in name
        x = to_fourier(p.t["in/fit_data"]) if fft else p.t["in/fit_data"]
        center, scale = center_scale(x, NormalizerConfig(method))
        near(center, p.t[f"fit/{name}/center"], atol=1e-5); near(scale, p.t[f"fit/{name}/scale"], atol=1e-5)


def test_normalizer_details(piece):
    p = piece("normalizer")
    near(to_fourier(p.t["in/x"]), p.t["fft/forward"], atol=1e-5)
    near(from_fourier(p.t["in/z"]), p.t["fft/inverse_of_z"], atol=1e-5)
    flat = p.t["in/fit_data"].clone(); flat[:, 1] = 2.5
    center, scale = center_scale(flat, NormalizerConfig("standard"))
    near(center, p.t["fit/constant_channel_standard/center"], atol=1e-5); near(scale, p.t["fit/constant_channel_standard/scale"], atol=1e-5)
    near(center_scale(flat)[1], p.t["fit/constant_channel_gaussian_robust_q25-75/scale"], atol=1e-5)


def test_times(piece):
    p = piece("step_sampler"); T = p.config["num_diffusion_train_steps"]
    abar = df.signal(schedule_config({**p.config, "num_diffusion_train_steps": T}))
    for name, case in p.config["cases"].items():
        config = TimestepConfig(case["sampling"], case["weighting"], float(case["beta_a"]), float(case["beta_b"]), float(case["max_gamma"]), float(case["min_gamma"]))
        if f"probs/{name}" in p.t: near(df.time_probabilities(config, T), p.t[f"probs/{name}"], rtol=1e-5, atol=1e-7)
        if f"gamma/{name}" in p.t: near(df.gammas(config, abar), p.t[f"gamma/{name}"], rtol=1e-4, atol=1e-6)
        steps = p.t["in/steps"]
        if f"loss_scales/{name}" in p.t:
            near(df.loss_weights(config, abar, steps, torch.ones_like(steps, dtype=torch.bool)), p.t[f"loss_scales/{name}"], rtol=1e-4, atol=1e-6)
        elif case["weighting"] == "none": assert df.loss_weights(config, abar, steps, steps >= 0) is None
    if "beta_b_below_1" in p.scalars:
        with pytest.raises(UserError): build_lcm(preset("two_tower_diffusion_lcm_mini", **{"times.beta_b": .5}))


# --- sizes, initial weights, other options, training ----------------------------------------------------------------

def dead_parameters(config):
    "Queries and keys of the reference's denoiser self-attention, which we do not have"
    return 2 * config.denoiser.layers * (config.dim ** 2 + config.dim) if hasattr(config, "denoiser") else 0


def test_parameter_counts(piece):
    p = piece("param_counts")
    for name, says in p.scalars.items():
        if "parameters" not in says: continue
        config = config_from_reference(says["config"])
        with torch.device("meta"): model = build_lcm(config)
        count = sum(q.numel() for q in model.parameters()) + dead_parameters(config)
        assert count == says["parameters"], name


def test_initial_weights(piece):
    p = piece("init_stats")
    for name, stats in p.scalars.items():
        theirs = p.config.get(name)
        if theirs is None: continue
        try: model = build_lcm(config_from_reference(theirs))
        except UserError as e: print(f"{name} skipped: {e}"); continue
        torch.manual_seed(0)
        model = build_lcm(model.config)
        ours = {reference_name(k, model.config.family): v for k, v in model.named_parameters()}
        for key, want in stats.items():
            if key not in ours:
                assert ".self_attn.q_proj" in key or ".self_attn.k_proj" in key or "normalizer" in key, key
                continue
            got = ours[key].detach()
            assert list(got.shape) == want["shape"], key
            if want["constant"]: assert (got == want["mean"]).all(), key
            else:
                small = got.numel() < 4000
                assert got.std().item() == pytest.approx(want["std"], rel=.12 if small else .03), key
                assert got.abs().max().item() <= 1.3 * max(abs(want["min"]), abs(want["max"])), key


def test_architecture_variant(piece, variant):
    p = piece("architecture_variants")
    family, name = variant.split("/")
    try: config = config_from_reference(p.config[family][name])
    except UserError as e: pytest.skip(f"{variant}: {e}")
    if f"{variant}/out" not in p.t: pytest.skip(f"{variant} is not in this recording")
    try: build_lcm(config)
    except UserError as e: pytest.skip(f"{variant}: {e}")
    model = build_lcm(config).eval()
    import_weights(model, p.under(f"{variant}/state_dict/"))
    x, m = p.t["in/padded_seqs"], p.t["in/padding_mask"]
    if family == "base": return near(model.outputs(x)[m], p.t[f"{variant}/out"][m])
    context = model.encode(x)
    near(context[m], p.t[f"{variant}/context"][m])
    mask = context_mask(torch.arange(x.shape[1]).unsqueeze(0), x.shape[1])
    near(model.denoise(p.t["in/latents"], p.t["in/timesteps"], context, mask)[m], p.t[f"{variant}/out"][m])


def cosine_lr(n, c):
    "The reference's cosine schedule with warm-up"
    if n < c["warmup_steps"]: return c["start_lr"] + (c["lr"] - c["start_lr"]) * n / c["warmup_steps"]
    length = c["max_steps"] - c["warmup_steps"] + 1
    return c["final_lr"] + (c["lr"] - c["final_lr"]) / 2 * (1 + math.cos(math.pi * ((n - c["warmup_steps"]) % length) / length))


def test_training_steps(piece):
    p, weights = piece("training_steps"), piece("base_lcm"); model = model_of(weights).train(); o = p.config["optimizer"]
    opt = torch.optim.AdamW(model.parameters(), lr=1., betas=o["betas"], eps=o["eps"], weight_decay=o["weight_decay"])
    docs = lambda i: docs_of(p.t, f"in/batch{i}_doc")[0]
    for n, (batches, want) in enumerate(zip(p.config["batches_of_step"], p.scalars["steps"])):
        losses = [model.loss(ConceptBatch.from_list(docs(i))) for i in batches]
        for l in losses: l.sum.backward()
        assert [l.sum.item() for l in losses] == pytest.approx(want["losses"], rel=1e-4)
        count = sum(int(l.count) for l in losses)
        assert count == want["num_targets"]
        for q in model.parameters(): q.grad /= count
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), p.config["max_grad_norm"])
        assert norm.item() == pytest.approx(want["grad_norm_after_normalisation_before_clip"], rel=1e-3)
        opt.param_groups[0]["lr"] = cosine_lr(n, p.config["lr_schedule"])
        assert opt.param_groups[0]["lr"] == pytest.approx(want["lr"], rel=1e-9)
        opt.step(); opt.zero_grad()
        ours = {reference_name(k, "base_lcm"): v for k, v in model.named_parameters()}
        for key, value in p.under(f"param_after_step{n}/").items(): near(ours[key], value, rtol=1e-4, atol=1e-5)
    for key, value in ours.items(): assert value.norm().item() == pytest.approx(p.scalars[f"final_param_norm/{key}"], rel=1e-4)


def test_weights_go_there_and_back(piece):
    for name in ("base_lcm", "two_tower_diffusion_lcm"):
        p = piece(name); theirs = p.under("state_dict/")
        back = export_weights(model_of(p))
        assert back.keys() == theirs.keys()
        for k, v in back.items():
            if "denoiser" in k and (".self_attn.q_proj" in k or ".self_attn.k_proj" in k): assert (v == 0).all() and v.shape == theirs[k].shape
            else: assert torch.equal(v, theirs[k]), k
