"""What each thing that an export does for its run-time is worth: one denoiser call, all variants in turns.

    python benchmarks/engine_options.py benchmarks/results/engine-options.json

Both reference generators in 8 bits (quantize.smooth, quantize.int8), one picture with guidance, so two rows a call.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from rich.progress import Progress

from diffpress.eval.latency import benchmark, speedups
from diffpress.eval.machine import describe_machine
from diffpress.export import ExportConfig, build, export, graph, session
from diffpress.export.components import flatten_inputs
from diffpress.export.session import Session, open_session
from diffpress.generator import Generator, SamplingPlan, patched
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.smooth import Smooth, SmoothConfig
from diffpress.stage import Context
from diffpress.targets import find_target

ROOT = Path(__file__).resolve().parents[1]
PLAN = SamplingPlan(steps=20, guidance_scale=3.0)


@dataclass(frozen=True)
class Variant:
    """How an engine differs from the default one."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Of the export."""
    patches: tuple[tuple[Any, str, Any], ...] = ()
    """Module, name and replacement of what is patched away."""
    joined: bool = False
    """Queries, keys and values that read the same tensor are one product, diffusers' ``fuse_projections``."""


WITHOUT_ATTENTION = (graph, "contrib_attention", contextlib.nullcontext)
FREE_AXES = (session, "OpenVinoSession", partial(session.OpenVinoSession, static_shapes=0))
VARIANTS: dict[str, dict[str, Variant]] = {  # the first of a target is the baseline
    "onnxruntime": {
        "standard operators": Variant(patches=((build, "runs_on_cpu", lambda providers: False),)),
        "products take their bias": Variant(patches=(WITHOUT_ATTENTION,)),
        "and attention is one operator (the default)": Variant(),
        "default, queries, keys and values joined": Variant(joined=True),
        "default, for one plan": Variant({"timesteps": "plan"}),
    },
    "openvino": {
        "free axes": Variant(patches=(FREE_AXES,)),
        "static shapes (the default)": Variant(),
        "default, queries, keys and values joined": Variant(joined=True),
        "default, for one plan": Variant({"timesteps": "plan"}),
        "default, bfloat16": Variant({"compute": "bfloat16"}),
        "default, bfloat16, for one plan": Variant({"compute": "bfloat16", "timesteps": "plan"}),
    },
}


def quantized(model: str, target: str, joined: bool) -> Generator:
    generator = Generator.load(ROOT / "models" / model)
    conditions = generator.conditions(32)
    context = Context(find_target(target), conditions, list(range(1000, 1032)), PLAN)
    Smooth(SmoothConfig()).apply(generator, context)
    if joined:
        join_projections(generator.denoiser)
    Int8(Int8Config()).apply(generator, context)
    return generator


def join_projections(denoiser: torch.nn.Module) -> None:
    for attention in [module for module in denoiser.modules() if isinstance(module, Attention)]:
        attention.fuse_projections()
        for name in ("to_k", "to_v") if attention.is_cross_attention else ("to_q", "to_k", "to_v"):
            delattr(attention, name)
        attention.set_processor(FusedAttnProcessor2_0())


def open_variant(generator: Generator, target: str, variant: str, folder: Path, call: dict) -> Session:
    """A warm session of one variant; everything that is patched is undone."""
    wanted = VARIANTS[target][variant]
    config = ExportConfig(target=target, **wanted.settings)  # type: ignore[arg-type]
    with ExitStack() as stack:
        for patch in wanted.patches:
            stack.enter_context(patched(*patch))
        export(generator, folder, config, plan=PLAN, conditions=generator.conditions(2))
        path = folder / generator.denoiser_name / "model.onnx"
        engine = open_session(path, target=target, compute=config.compute)
        engine(call)
    return engine


def measure(model: str, target: str, rounds: int) -> dict[str, Any]:
    original = Generator.load(ROOT / "models" / model)
    recorded = original.record(original.conditions(1), seeds=[7], plan=PLAN)[PLAN.steps // 2]
    call, expected = flatten_inputs(recorded.inputs), recorded.output
    generators = {joined: quantized(model, target, joined) for joined in (False, True)}
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            name: open_variant(generators[variant.joined], target, name, Path(folder) / str(index), call)
            for index, (name, variant) in enumerate(VARIANTS[target].items())
        }
        timings = benchmark(
            {name: lambda e=engine: e(call) for name, engine in engines.items()}, rounds=rounds, warmup=5
        )
        errors = {name: float((e(call)[0] - expected).norm() / expected.norm()) for name, e in engines.items()}
    ratios = speedups(timings, baseline=next(iter(timings)))
    return {
        name: {
            "median_ms": timing.median_ms,
            "p95_ms": timing.p95_ms,
            "speed-up": dataclasses.asdict(ratios[name]) if name in ratios else None,
            "relative error against float": errors[name],
            "rounds": timing.n,
        }
        for name, timing in timings.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    cases = [(model, target) for model in ("emoji-dit", "emoji-unet") for target in VARIANTS]
    found: dict[str, Any] = {}
    with Progress() as progress, torch.no_grad():
        for model, target in progress.track(cases, description="Exporting and timing"):
            found.setdefault(model, {})[target] = measure(model, target, args.rounds)
    facts = {"machine": describe_machine(), "plan": dataclasses.asdict(PLAN), "denoiser call": found}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
