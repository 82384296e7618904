"""What noise in training does for a decoder: exact reconstruction against noise on the vectors. Prints JSON.

python benchmarks/robust_decoder.py [FOLDER] [--steps 1500] [--finetune 600]

Trains a `mini` space without noise, then only its decoder with noise on the same vectors (its space and id stay), and
measures both beside the shipped space on sentences that no training has seen. Some ten minutes on one core; what is
already in FOLDER is used again.
"""
import argparse
import json

from lcm_nb.concepts.mini import load_mini, unseen
from lcm_nb.concepts.space import reconstruction
from lcm_nb.training.recipes import recipe
from lcm_nb.training.run import run_recipe
from lcm_nb.worlds.stories import StoryWorld

LEVELS = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]


def curve(space, sentences):
    "Share of sentences rebuilt exactly in their own language, at each level"
    rows = [reconstruction(space, sentences, level) for level in LEVELS]
    return [sum(r[lang, lang] for lang in sentences) / len(sentences) for r in rows]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("folder", nargs="?", default="runs/robust_decoder")
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--finetune", type=int, default=600)
    args = p.parse_args()
    clean, robust = f"{args.folder}/clean", f"{args.folder}/robust"
    run_recipe(recipe("space_mini", overrides={"noise": 0.0}, run_dir=clean, **{"training.max_steps": args.steps}))
    start = f"{clean}/checkpoints/step_{args.steps}"
    run_recipe(recipe("space_mini", init_from=start, decoder_only=True, overrides={"noise": 0.6}, run_dir=robust,
                      **{"training.max_steps": args.finetune, "training.lr": 1e-3}))
    spaces = {"without noise": load_mini(start), "then decoder with noise": load_mini(f"{robust}/checkpoints/step_{args.finetune}"), "shipped": load_mini()}
    sentences = unseen(StoryWorld(), 300)
    print(json.dumps({"noise": LEVELS, "id": {name: s.id for name, s in spaces.items()}, "exact": {name: curve(s, sentences) for name, s in spaces.items()}}))


if __name__ == "__main__": main()
