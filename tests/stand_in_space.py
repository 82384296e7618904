"A concept space for tests: a vector for each sentence from a hash of it, at the speed of a small real encoder."
import os
import time

import torch

from lcm_nb.core.rng import key_seed


class StandInSpace:
    id, dim, languages, license = "stand-in@1", 16, ["eng_Latn", "fra_Latn"], "MIT"
    seconds = float(os.environ.get("STAND_IN_SECONDS", 0))  # for each sentence

    def encode(self, texts, lang, progress=False):
        time.sleep(self.seconds * len(texts))
        seeds = [torch.Generator().manual_seed(key_seed(t, lang)) for t in texts]
        return torch.stack([torch.randn(self.dim, generator=g) for g in seeds]) if texts else torch.zeros(0, self.dim)

    def decode(self, concepts, lang): return ["?"] * len(concepts)

    def coverage(self, texts, lang): return ["xyzzy" not in t for t in texts]


def space(): return StandInSpace()
