"""Does the latency table foretell a smaller network? Blocks are taken out, the rest is built, and both are compared.

    python benchmarks/latency_table.py benchmarks/results/latency-table.json
    python benchmarks/latency_table.py try.json --nets tiny-dit tiny-unet --rounds 4

Weights are random. The table is measured once, on the whole network's engine. For each budget, blocks in a random order
leave until a share of what all removable blocks take is gone: whole blocks of a DiT; attentions, and residual blocks of
equal width, of a U-Net. The engines of all networks are then timed in turns. ``error`` is predicted / measured - 1.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from denoisers.nets import NETS, PLAN, SMOKE, find_net, make_pipeline
from denoisers.results import write
from rich.progress import Progress
from torch import Tensor, nn

from diffpress.eval.latency import benchmark, latency_ratios
from diffpress.eval.machine import describe_machine
from diffpress.eval.statistics import median_interval
from diffpress.export import ExportConfig
from diffpress.export.profile import latency_table, open_denoiser, predicted_latency, profile
from diffpress.generator import Generator
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.stage import Context
from diffpress.targets import find_target

BUDGETS = (0.25, 0.5, 0.75)
"""Shares of the removable time that go."""
WHOLE = "whole"


class Skipped(nn.Module):
    """In the place of a residual block or, ``in_tuple``, of an attention."""

    def __init__(self, *, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        return (x,) if self.in_tuple else x


def removable(network: nn.Module) -> list[str]:
    """Blocks whose output has the shape of their input."""
    found = []
    for name, module in network.named_modules():
        kind = type(module).__name__
        same_width = kind == "ResnetBlock2D" and module.conv_shortcut is None
        if kind in ("BasicTransformerBlock", "Transformer2DModel") or same_width:
            found.append(name)
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def without(generator: Generator, removed: list[str]) -> Generator:
    """A copy of the generator whose denoiser lacks these blocks."""
    smaller = Generator(copy.deepcopy(generator.pipeline), generator.source)
    network: Any = smaller.denoiser
    if type(network).__name__ == "DiTTransformer2DModel":
        kept = [
            block for at, block in enumerate(network.transformer_blocks) if f"transformer_blocks.{at}" not in removed
        ]
        network.transformer_blocks = nn.ModuleList(kept)
        return smaller
    for name in removed:
        parent, _, child = name.rpartition(".")
        in_tuple = type(network.get_submodule(name)).__name__ == "Transformer2DModel"
        setattr(network.get_submodule(parent), child, Skipped(in_tuple=in_tuple))
    return smaller


def choose(table: dict[str, float], blocks: list[str], share: float, *, seed: int) -> list[str]:
    """Blocks in a random order as long as they take less than ``share`` of what all take; at least one."""
    order = random.Random(seed).sample(blocks, len(blocks))
    limit, chosen = share * sum(table[name] for name in blocks), []
    for name in order:
        if sum(table[other] for other in (*chosen, name)) <= limit:
            chosen.append(name)
    return sorted(chosen) or [min(blocks, key=table.__getitem__)]


def measure(net: str, target: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prediction and measurement for every budget."""
    generator = Generator(make_pipeline(find_net(net), seed=options.seed, outliers=False))
    conditions, settings = generator.conditions(2), ExportConfig(target=target)  # type: ignore[arg-type]
    if options.int8:
        context = Context(find_target(target), generator.conditions(4), list(range(4)), PLAN)
        Int8(Int8Config()).apply(generator, context)
    with tempfile.TemporaryDirectory() as scratch:

        def build(name: str, network: Generator) -> tuple[Any, dict[str, Tensor]]:
            return open_denoiser(network, settings, Path(scratch) / name, plan=PLAN, conditions=conditions)

        engines = {WHOLE: build(WHOLE, generator)}
        found = profile(*engines[WHOLE], rounds=options.rounds)
        table = latency_table(found)
        blocks = [name for name in removable(generator.denoiser) if name in table]
        chosen = {f"{share:.0%}": choose(table, blocks, share, seed=options.seed) for share in BUDGETS}
        for name, removed in chosen.items():
            engines[name] = build(name, without(generator, removed))
        calls = {name: lambda engine=engine: engine[0](engine[1]) for name, engine in engines.items()}
        timings = benchmark(calls, rounds=options.rounds, warmup=3)
    ratios = latency_ratios(timings, baseline=WHOLE)
    budgets = {}
    for name, removed in chosen.items():
        predicted, measured = predicted_latency(table, removed), median_interval(timings[name].samples_ms, unit="ms")
        budgets[name] = {
            "removed": removed,
            "predicted_ms": predicted,
            "measured_ms": dataclasses.asdict(measured),
            "error": predicted / measured.value - 1,
            "predicted_ratio": predicted / table[""],
            "measured_ratio": dataclasses.asdict(ratios[name]),
            "error_of_ratio": predicted / table[""] / ratios[name].value - 1,
        }
    return {
        "title": find_net(net).title,
        "provider": found.provider,
        "table_ms": found.call_ms,
        "profiled_ms": found.profiled_ms,
        "sum_of_layers_ms": found.layers_ms,
        "unattributed_ms": found.unattributed_ms,
        "measured_ms": dataclasses.asdict(median_interval(timings[WHOLE].samples_ms, unit="ms")),
        "blocks_ms": {name: table[name] for name in blocks},
        "budgets": budgets,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--nets", nargs="+", default=["dit-b", "unet-small"], choices=(*NETS, *SMOKE))
    parser.add_argument(
        "--targets", nargs="+", default=["onnxruntime", "openvino"], choices=("onnxruntime", "openvino")
    )
    parser.add_argument("--int8", action="store_true", help="quantize before everything else")
    parser.add_argument("--rounds", type=int, default=30, help="at least 2 (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="%(default)s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}; allowed: 2 or more")
    torch.set_num_threads(options.threads)
    settings = {key: getattr(options, key) for key in ("seed", "rounds", "int8", "threads")}
    data: dict[str, Any] = {"settings": settings, "machine": describe_machine(), "nets": {}}
    cases = [(net, target) for net in options.nets for target in options.targets]
    with Progress() as progress, torch.no_grad():
        for net, target in progress.track(cases, description="Exporting and timing"):
            data["nets"].setdefault(net, {})[target] = measure(net, target, options)
            write(options.output, data)
    for net, target in cases:
        for name, budget in data["nets"][net][target]["budgets"].items():
            measured = budget["measured_ms"]["value"]
            print(
                f"{net}, {target}, {name} removed: predicted {budget['predicted_ms']:.2f} ms, measured {measured:.2f} "
                f"ms ({budget['error']:+.1%}); as a share of the whole {budget['error_of_ratio']:+.1%}"
            )


if __name__ == "__main__":
    main()
