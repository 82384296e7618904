"""What noise in training does for a decoder: exact reconstruction against noise on the vectors. Prints JSON.

python benchmarks/robust_decoder.py [FOLDER] [--steps 1500] [--finetune 1500] [--noise 1.5] [--lr 2e-3]

Trains a `mini` space without noise, then only its decoder with noise on the same vectors (its space and id stay), and
measures both beside the shipped space on sentences that no training has seen. What the vectors themselves would allow is
measured by the nearest of 40,000 sentences. Some fifteen minutes on one core; what is already in FOLDER is used again.
"""
import argparse
import json

import torch

from lcm_nb.concepts.mini import load_mini, unseen
from lcm_nb.concepts.space import reconstruction
from lcm_nb.training.recipes import recipe
from lcm_nb.training.run import run_recipe
from lcm_nb.worlds.stories import StoryWorld

LEVELS = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]


def curve(space, sentences):
    "Share of sentences rebuilt exactly in their own language, at each level"
    rows = [reconstruction(space, sentences, level) for level in LEVELS]
    return [round(sum(r[lang, lang] for lang in sentences) / len(sentences), 4) for r in rows]


def nearest(space, texts, others, lang):
    "Share of moved concepts whose nearest sentence, by distance in standard deviations, is still the right one"
    known = list(dict.fromkeys([*texts, *others]))
    x = space.encode(known, lang, check=False)
    scale = x[:len(texts)].std(0)
    noise = torch.randn(x[:len(texts)].shape, generator=torch.Generator().manual_seed(0))
    right = torch.arange(len(texts))
    return [(torch.cdist(x[:len(texts)] / scale + level * noise, x / scale).argmin(1) == right).float().mean().item() for level in LEVELS]


def nearest_curve(space, sentences, world):
    "`nearest`, on average over the languages"
    events = world.random_events(60_000, seed=11)
    rows = [nearest(space, texts, [world.tell(e, lang) for e in events], lang) for lang, texts in sentences.items()]
    return [round(sum(r) / len(r), 4) for r in zip(*rows)]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("folder", nargs="?", default="runs/robust_decoder")
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--finetune", type=int, default=1500)
    p.add_argument("--noise", type=float, default=1.5)
    p.add_argument("--lr", type=float, default=2e-3)
    args = p.parse_args()
    clean, robust = f"{args.folder}/clean", f"{args.folder}/robust_{args.noise}_{args.finetune}"
    run_recipe(recipe("space_mini", noise=0.0, run_dir=clean, **{"training.max_steps": args.steps}))
    start = f"{clean}/checkpoints/step_{args.steps}"
    run_recipe(recipe("space_mini", init_from=start, decoder_only=True, noise=args.noise, run_dir=robust,
                      **{"training.max_steps": args.finetune, "training.lr": args.lr}))
    spaces = {"without noise": load_mini(start), "then the decoder with noise": load_mini(f"{robust}/checkpoints/step_{args.finetune}"), "shipped": load_mini()}
    world = StoryWorld()
    sentences = unseen(world, 300)
    exact = {name: curve(s, sentences) for name, s in spaces.items()} | {"nearest sentence, without noise": nearest_curve(spaces["without noise"], sentences, world)}
    print(json.dumps({"noise": LEVELS, "id": {name: s.id for name, s in spaces.items()}, "exact": exact}))


if __name__ == "__main__": main()
