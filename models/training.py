"""What the training scripts share: one loop with bf16, EMA, checkpoints that resume, and a progress bar."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
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
    device = pick_device()
    path = WORK / f"{name}.checkpoint.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)
    ema = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75)
    state = {"step": 0, "seconds": 0.0, "losses": []}
    if path.exists():
        stored = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        ema.load_state_dict(stored["ema"])
        state = stored["state"]
    ema.to(device)

    def save_checkpoint() -> None:
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
        torch.save({**parts, "state": state}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    model.train()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.4f}")) as progress:
        bar = progress.add_task(name, total=steps, completed=state["step"], loss=math.nan)
        began, running = time.monotonic() - state["seconds"], None
        for step in range(state["step"], steps):
            torch.manual_seed(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak=peak, warmup=min(200, steps // 10 + 1))
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_of(np.random.default_rng([step, 1]))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema.step(model.parameters())
            value = loss.item()
            if not math.isfinite(value):
                raise SystemExit(f"{name}: loss is {value} at step {step}; the last good checkpoint is {path}")
            running = value if running is None else 0.98 * running + 0.02 * value
            progress.update(bar, completed=step + 1, loss=running)
            if (step + 1) % 100 == 0 or step + 1 == steps:
                state = {
                    "step": step + 1,
                    "seconds": time.monotonic() - began,
                    "losses": [*state["losses"], round(running, 5)],
                }
                print(f"{name} {step + 1}/{steps} loss {running:.4f} {state['seconds']:.0f} s", flush=True)
            if (step + 1) % 500 == 0 or step + 1 == steps:
                save_checkpoint()
            if export and (step + 1) % 1500 == 0 and step + 1 < steps:
                ema.store(model.parameters())
                ema.copy_to(model.parameters())
                export()
                ema.restore(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    if export:
        export()
    return {
        "command": " ".join(["python", f"models/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "steps": steps,
        "minutes": round(state["seconds"] / 60, 1),
        "seed": "the step's number",
        "loss every 100 steps": state["losses"],
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        if device.type == "cpu"
        else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def write_provenance(folder: Path, provenance: dict) -> None:
    (folder / "training.json").write_text(json.dumps(provenance, indent=1) + "\n")
