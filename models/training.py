"""What the training scripts share: one loop with bf16, EMA, checkpoints that resume, and a progress bar."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parent
WORK = Path(os.environ.get("EMOJI_WORK", ROOT / "work"))  # checkpoints and caches: rebuilt, never committed


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def learning_rate(step: int, steps: int, *, peak: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine to 2 % of ``peak``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Training:
    """A model with its optimizer, its moving average and how far it is, on disk as ``<name>.checkpoint.pt``."""

    def __init__(self, model: torch.nn.Module, name: str, *, peak: float, weight_decay: float, decay: float) -> None:
        self.model, self.name, self.device = model, name, pick_device()
        self.path = WORK / f"{name}.checkpoint.pt"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=peak, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True
        )
        self.ema = EMAModel(model.parameters(), decay=decay, use_ema_warmup=True, power=0.75)
        self.state = {"step": 0, "seconds": 0.0, "losses": []}
        self._resume()
        self.ema.to(self.device)

    def _parts(self) -> dict:
        return {"model": self.model, "optimizer": self.optimizer, "ema": self.ema}

    def _resume(self) -> None:
        if self.path.exists():
            stored = torch.load(self.path, map_location=self.device, weights_only=True)
            for key, part in self._parts().items():
                part.load_state_dict(stored[key])
            self.state = stored["state"]

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        parts = {key: part.state_dict() for key, part in self._parts().items()}
        torch.save({**parts, "state": self.state}, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def step(self, loss_of: Callable[[np.random.Generator], torch.Tensor], number: int, rate: float) -> float:
        """One update under bf16, its draws seeded by ``number``; returns the loss."""
        torch.manual_seed(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = loss_of(np.random.default_rng([number, 1]))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.model.parameters())
        value = loss.item()
        if not math.isfinite(value):
            raise SystemExit(f"{self.name}: loss is {value} at step {number}; the last good checkpoint is {self.path}")
        return value

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Run the block with the moving average's weights in the model."""
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        yield
        self.ema.restore(self.model.parameters())


def fit(
    model: torch.nn.Module,
    loss_of: Callable[[np.random.Generator], torch.Tensor],
    *,
    name: str,
    steps: int,
    peak: float,
    weight_decay: float = 0.0,
    ema_decay: float = 0.999,
    export: Callable[[], None] | None = None,
) -> dict:
    """Train ``model`` in place for ``steps`` and leave its EMA weights in it.

    ``loss_of(rng)`` draws a batch and returns a scalar loss; it runs under bf16 autocast. Every draw of step k comes
    from a generator seeded by k, so a run that was killed and resumed sees the batches it would have seen.
    ``export()`` is called with the EMA weights in the model every 1500 steps and at the end.
    Returns the provenance that the model card quotes.
    """
    training = Training(model, name, peak=peak, weight_decay=weight_decay, decay=ema_decay)
    state, running = training.state, None
    model.train()
    with _bar(name, state["step"], steps) as show:
        began = time.monotonic() - state["seconds"]
        for step in range(state["step"], steps):
            rate = learning_rate(step, steps, peak=peak, warmup=min(200, steps // 10 + 1))
            value = training.step(loss_of, step, rate)
            running = value if running is None else 0.98 * running + 0.02 * value
            done, last = step + 1, step + 1 == steps
            show(done, running)
            if done % 100 == 0 or last:
                state |= {"step": done, "seconds": time.monotonic() - began}
                state["losses"].append(round(running, 5))
                print(f"{name} {done}/{steps} loss {running:.4f} {state['seconds']:.0f} s", flush=True)
            if done % 500 == 0 or last:
                training.save()
            if export and done % 1500 == 0 and not last:
                with training.averaged():
                    export()
    training.ema.copy_to(model.parameters())
    model.eval()
    if export:
        export()
    return _provenance(state, steps)


@contextmanager
def _bar(name: str, done: int, steps: int) -> Iterator[Callable[[int, float], None]]:
    """A progress bar; the block is given ``show(done, loss)``."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.4f}")) as progress:
        task = progress.add_task(name, total=steps, completed=done, loss=math.nan)
        yield lambda completed, loss: progress.update(task, completed=completed, loss=loss)


def _provenance(state: dict, steps: int) -> dict:
    """What the model card quotes of a finished training."""
    processor = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return {
        "command": " ".join(["python", f"models/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "steps": steps,
        "minutes": round(state["seconds"] / 60, 1),
        "seed": "the step's number",
        "loss every 100 steps": state["losses"],
        "machine": processor if pick_device().type == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def write_provenance(folder: Path, provenance: dict) -> None:
    (folder / "training.json").write_text(json.dumps(provenance, indent=1) + "\n")
