"""Values measured on the reference implementation with weights and inputs that a formula gives, so that no file is needed."""

import pytest
import torch

from lcm_nb.core.config import replace
from lcm_nb.data.batches import ConceptBatch
from lcm_nb.models import diffusion as df
from lcm_nb.models.config import BaseLCMConfig, NoiseScheduleConfig, Sampling, Stopping, TimestepConfig, TransformerConfig, TwoTowerLCMConfig
from lcm_nb.models.lcm import build_lcm
from lcm_nb.models.reference import export_weights, import_weights
from lcm_nb.models.two_tower import Draws, context_mask

STACK = TransformerConfig(layers=2, heads=2, ffn_dim=256, dropout=0.)
TOY = TransformerConfig(layers=2, heads=2, ffn_dim=64, ffn="relu", norm="standard", positions="learned", output_bias=False, dropout=0.)
BASE = BaseLCMConfig(concept_dim=8, dim=16, max_len=64, decoder=STACK)
TWO = TwoTowerLCMConfig(concept_dim=8, dim=16, max_len=64, encoder=STACK, denoiser=replace(STACK, positions="none"))


def by_formula(config):
    "A model whose weights follow from their names' order"
    model = build_lcm(config)
    weights = {}
    for k, (name, v) in enumerate(sorted(export_weights(model).items())):
        j = torch.arange(v.numel(), dtype=torch.float64)
        w = .3 * torch.sin(.7 * j + 1.3 * k) + (1 if "norm.weight" in name else 0)
        if name.endswith("normalizer.center"): w = .01 * torch.sin(j)
        if name.endswith("normalizer.scale"): w = .05 + .01 * torch.cos(j)
        weights[name] = w.float().view(v.shape)
    import_weights(model, weights)
    return model.eval(), weights


def X(b, n):
    b, t, i = torch.meshgrid(torch.arange(b), torch.arange(n), torch.arange(1, 9), indexing="ij")
    return torch.sin((.3 * i * (t + 1) + 1.1 * t ** 2 + .5 * b).double()).float()


def same(got, want, tolerance=1e-5): torch.testing.assert_close(got[..., :len(want)].float(), torch.tensor(want), rtol=tolerance, atol=tolerance)


def count(weights): return sum(v.numel() for k, v in weights.items() if "normalizer" not in k)


def test_base():
    model, weights = by_formula(BASE)
    assert (len(weights), count(weights)) == (39, 28_168)
    y = model.outputs(X(2, 5))
    same(y[0, 0], [.305176, -.570858, -.872185, -.016831])
    same(y[1, 4], [-.039291, -.880335, -.653368, .381488])
    same(y[1, 2], [-.000648, -.788519, -.654733, .289118])
    same(model.predict(ConceptBatch.from_list(list(X(2, 5))))[0, 4], [-.058290, -.033699, .024112, .027861])


def test_toy_base():
    y = by_formula(BaseLCMConfig(concept_dim=8, dim=16, max_len=64, decoder=TOY, normalizer=None))[0].outputs(X(2, 5))
    same(y[0, 0], [-1.473558, .946647, 2.126897, -.008261])
    same(y[1, 4], [-1.965693, .148518, 2.294984, .858113])


def test_two_tower():
    model, weights = by_formula(TWO)
    assert (len(weights), count(weights)) == (100, 67_688)
    same(model.denoiser.time(torch.tensor([57]))[0], [.055033, -.415257, .045360, .508519])
    x = X(2, 5)
    context, noisy = model.encode(x), 1.5 * x + .3
    same(context[0, 0], [-1.383304, 1.575333, -1.174333, 1.203693])
    same(context[1, 4], [-1.373820, 1.412150, -1.001176, 1.135122])
    times = torch.tensor([[3, 57, 99, 0, 20], [11, 42, 8, 77, 64]])
    y = model.denoise(noisy, times, context, context_mask(torch.arange(5).unsqueeze(0), 5))
    same(y[0, 0], [.585863, .268773, -.811974, -.832016])
    same(y[0, 3], [.996978, .025072, -1.322033, -.795403])
    same(y[1, 4], [-.099118, .449075, -.053788, -.704486])
    at = torch.tensor([[3], [2]]) + torch.arange(3)
    y = model.denoise(noisy[:, :3], times[:, :3], context, context_mask(at, 5))
    same(y[0, 0], [.607091, .288183, -.825321, -.856845])
    same(y[1, 2], [1.532238, -.591487, -2.107622, -.497801])
    y = model.denoise(noisy[:, :1], times[:, :1], context)
    same(y[0, 0], [.607228, .288668, -.825260, -.857305])
    same(y[1, 0], [.737202, -.323450, -1.203760, -.398861])


CONFIGS = {"cosine T=100": NoiseScheduleConfig(), "cosine T=1000": NoiseScheduleConfig(steps=1000), "not rescaled": NoiseScheduleConfig(zero_snr=False),
           "sigmoid 1.5": NoiseScheduleConfig(kind="sigmoid"), "sigmoid 3.5": NoiseScheduleConfig(kind="sigmoid", sigmoid_a=3.5),
           "linear": NoiseScheduleConfig(1000, "linear"), "scaled linear": NoiseScheduleConfig(1000, "scaled_linear")}
SIGNAL = {"cosine T=100": [.99936867, .99825197, .96670061, .47805437, .019425975, .00022796521, 0],
          "cosine T=1000": [.99995875, .99991262, .97157443, .49226481, .023603309, 2.2778131e-6, 0],
          "not rescaled": [.99936873, .99825251, .96671665, .47826457, .019544374, .0002428572, 2.4285407e-7],
          "sigmoid 1.5": [.99898565, .99709105, .95831746, .48457685, .029876117, .00095295173, 0],
          "sigmoid 3.5": [1, .99999881, .99933684, .46504799, .00030378971, 9.7134524e-8, 0],
          "linear": [.99989998, .99977934, .89449036, .0752462, .00010303845, 4.2132742e-9, 0],
          "scaled linear": [.9999001, .9997946, .97038245, .31781536, .0017120073, 7.9863078e-8, 0]}


@pytest.mark.parametrize("name", SIGNAL)
def test_signal(name):
    a, T = df.signal(CONFIGS[name]), CONFIGS[name].steps
    torch.testing.assert_close(a[[0, 1, T // 10, T // 2, 9 * T // 10, T - 2, T - 1]], torch.tensor(SIGNAL[name]), rtol=2e-4, atol=1e-6)


def test_grids():
    def ran(T, S): return df.grid(T, S, compat="reference")[0]
    assert (len(ran(100, 40)), ran(100, 40)[:2], ran(100, 40)[-1]) == (50, [99, 97], 1)
    assert (len(ran(100, 30)), ran(100, 30)[-1], len(ran(100, 7))) == (34, 0, 8)
    assert (len(ran(1000, 40)), ran(1000, 40)[:2], ran(1000, 40)[-1]) == (40, [999, 974], 24)
    assert df.grid(1000, 10, "linspace", "reference")[0] == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]


def step(t, prediction="sample", eta=0., scaling=1.):
    a, x, m = df.signal(), torch.tensor([.5, -1, 2]), torch.tensor([.1, -.2, .3])
    clean, eps = df.read(a[t], x, m, prediction)
    return clean, df.ddim_step(clean, eps / scaling, a[t], a[t - 2] if t >= 2 else torch.ones(()), eta, torch.ones(3))


def test_steps():
    same(step(51)[1], [.489550, -.979100, 1.953948])
    same(step(51, "epsilon")[1], [.511977, -1.023954, 2.052492])
    same(step(51, "epsilon")[0], [.627415, -1.254831, 2.617467])
    same(step(51, "v_prediction")[1], [.496639, -.993279, 1.989675])
    same(step(51, "v_prediction")[0], [.266719, -.533438, 1.140191])
    same(step(99)[1], [.502833, -1.005666, 2.008264])
    same(step(1)[1], [.1, -.2, .3])
    same(step(51, eta=1.)[1], [.7080, -.6845, 2.0922], 1e-4)
    same(step(51, scaling=1.1)[1], [.4514, -.9029, 1.7955], 1e-4)
    assert step(99, "epsilon")[0].isinf().all()


def pairs():
    "Supervised batch: sources of 5 and 3 concepts, targets of 2 and 3"
    x = X(2, 5)
    sources, targets = [.05 * x[0, :5], .05 * x[1, :3]], [.03 * x[0, :2], .03 * x[0, :3]]
    return ConceptBatch.from_list([torch.cat(p) for p in zip(sources, targets)], source_lengths=[5, 3]), ConceptBatch.from_list(sources)


@pytest.mark.parametrize("rmse, alone, pair", [(False, 34.722679, 15.281427), (True, 14.331921, 8.682145)])
def test_base_losses(rmse, alone, pair):
    model, (supervised, sources) = by_formula(replace(BASE, rmse=rmse))[0], pairs()
    for batch, want, n in ((sources, alone, 6), (supervised, pair, 5)):
        l = model.loss(batch)
        assert l.sum.item() == pytest.approx(want, rel=1e-5) and int(l.count) == n


def formula_draws(b, q):
    j = torch.arange(b * q * 8, dtype=torch.float64)
    return Draws(torch.cos(.9 * j).float().view(b, q, 8), (37 * torch.arange(b * q) % 100).view(b, q))


@pytest.mark.parametrize("weighting, alone, pair", [("none", 71.56707, 27.55405), ("clamp_snr", 90.86065, 21.16418)])
def test_two_tower_losses(weighting, alone, pair):
    model, (supervised, sources) = by_formula(replace(TWO, **{"times.weighting": weighting}))[0], pairs()
    for batch, want, q, n, raw in ((sources, alone, 5, 8, .18136), (supervised, pair, 3, 5, .06787)):
        l = model.loss(batch, formula_draws(2, q))
        assert l.sum.item() == pytest.approx(want, rel=2e-5) and int(l.count) == n
        assert l.terms["unnormalized_mse"].item() == pytest.approx(raw, rel=1e-4)


def test_times():
    same(df.time_probabilities(TimestepConfig(sampling="beta"), 100)[[0, 1, 2, 99]], [.020313, .017684, .016306, .008087], 1e-6)
    same(df.loss_weights(TimestepConfig(weighting="clamp_snr"), df.signal(), torch.tensor([10, 50, 90]), torch.ones(3).bool()), [2.5271, .4629, .0100], 1e-4)


SETTINGS = [(Sampling(10, 1., 0., 1.), [.020819, .032039, -.014243, -.033343], [.004417, .049612, .004191, -.039514]),
            (Sampling(10, 3., .7, .6), [.027270, .018176, -.023817, -.026673], [.033171, .043575, -.019809, -.043683]),
            (Sampling(40, 3., .7, .6, compat="reference"), [.028040, .016092, -.025128, -.025703], [-.040407, .082556, .049526, -.047179])]


@pytest.mark.parametrize("sampling, first, second", SETTINGS)
def test_generation(sampling, first, second):
    model, z = by_formula(TWO)[0], torch.sin(1.7 * torch.arange(1, 9)).unsqueeze(0)
    made = model.generate(list(X(2, 3)), sampling, Stopping(max_length=2), noise=lambda row, at, n: z)
    same(made[0][0], first)
    same(made[1][1], second, 2e-5)


def test_base_generation():
    made = by_formula(BASE)[0].generate([X(2, 3)[0], X(2, 3)[1, :2]], n=2)
    same(made[0][-1], [.014276, -.017661, -.025940, -.001525])
    same(made[1][-1], [.014067, -.021350, -.027019, .000762])


def test_slip_in_quantiles():
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    from lcm_nb.models.normalizer import Normalizer
    slip = Normalizer.fit(x, compat="reference")
    q = torch.quantile(x[:, 0], torch.tensor([.0025, .0075]))
    assert slip.scale.item() == pytest.approx((q[1] - q[0]).item() / .374655, rel=1e-3)
