"""The same recipe on one process and on two: the same student."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffpress.artifact import read_json

pytestmark = pytest.mark.slow

RECIPE = """
model: {model}
calibration: {{samples: 2, batch_size: 2, steps: 2}}
stages:
  - distill.reflow:
      steps: 2
      pairs: {{count: 16, held_out: 4, steps: 4, shard: 4, batch_size: 4}}
      training: {{steps: 6, batch_size: 4, learning_rate: 0.0001, warmup: 1}}
evaluate: {{samples: 4, batch_size: 4, steps: 4, baselines: [eager], latency_rounds: 3}}
gate: {{}}
"""

TOLD = """
import os, sys
from diffpress import processes
from diffpress.errors import ConfigError

def refuse():
    raise ConfigError(f"refused by {os.environ['RANK']}")

found = [processes.agreed(os.getpid), processes.agreed(lambda: {"": float(os.getpid())})]
try:
    processes.agreed(refuse)
except ConfigError as error:
    found.append(str(error))
open(os.path.join(sys.argv[1], os.environ["RANK"]), "w").write(repr((os.getpid(), found)))
"""


def run(recipe: Path, output: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, "diffpress", "run", str(recipe), "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_two_processes_make_the_student_of_one(dit_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=dit_folder))
    alone = run(recipe, tmp_path / "one")
    both = run(recipe, tmp_path / "two", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    assert alone.returncode in (0, 1), alone.stderr  # 1: the tiny engine may be slower than torch
    assert both.returncode in (0, 1), both.stderr
    stage = "stages/01-distill.reflow"
    one, two = (load_file(tmp_path / name / stage / "denoiser.safetensors") for name in ("one", "two"))
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, atol=1e-5, rtol=0)
    losses = [read_json(tmp_path / name / stage / "metadata.json")["losses"] for name in ("one", "two")]
    assert len(losses[1]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][0] != losses[0][1]
    assert (tmp_path / "two/engine/model_index.json").is_file(), both.stderr
    before = load_file(dit_folder / "transformer/diffusion_pytorch_model.safetensors")
    assert max(float((one[name] - before[name]).abs().max()) for name in before if name in one) > 2e-4  # it did learn


def test_what_only_the_first_process_finds_all_go_by(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(TOLD)
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = [sys.executable, "-m", *launcher, str(tmp_path / "told.py"), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    first, second = (ast.literal_eval((tmp_path / rank).read_text()) for rank in "01")
    assert first[1] == second[1] == [first[0], {"": float(first[0])}, "refused by 0"]
    assert first[0] != second[0]
