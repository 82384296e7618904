"Small things that several tests use: random documents as prepared data, and the command line as a subprocess."
import os
import subprocess
import sys

import numpy as np

from lcm_nb.data.cards import concept_column, write_concepts

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def write_documents(folder, splits={"train": 60, "validation": 12}, dim=16, seed=0):
    "A folder of prepared data with random documents of 4 to 10 concepts"
    rng = np.random.default_rng(seed)
    for split, n in splits.items():
        vectors = [rng.normal(size=(rng.integers(4, 11), dim)).astype("float32") for _ in range(n)]
        columns = {"id": [f"{split}-{i}" for i in range(n)], "text_sentences": [[f"Sentence {j}." for j in range(len(v))] for v in vectors],
                   "text_sentences_sonar_emb": concept_column(vectors, "float32")}
        path = folder / f"split={split}" / "part-00000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_concepts(path, columns, space="toy@0", dim=dim, license="none", lang="eng_Latn")
    return folder


def lcm_nb(*args, **kw):
    "Start `lcm-nb` with these arguments; gives the running process"
    command = [sys.executable, "-m", "lcm_nb", *map(str, args)]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)


def finish(process, timeout=300):
    "(exit code, output) of a process"
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out
