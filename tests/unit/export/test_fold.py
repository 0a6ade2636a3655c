"""Tables of what depends on the timestep alone: the same numbers for the plan's timesteps, with fewer products."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from diffpress.errors import ConfigError, EngineError
from diffpress.export import ExportConfig, export, load
from diffpress.export.build import timesteps_of
from diffpress.export.components import Flat, find_components, flatten_inputs
from diffpress.export.fold import fold_timesteps
from diffpress.export.graph import export_graph
from diffpress.export.modules import check_timesteps
from diffpress.generator import Generator, SamplingPlan
from diffpress.quantize.weights import Weights, WeightsConfig

PRODUCTS = ("MatMul", "Gemm", "MatMulNBits")


def graph_of(generator, plan, folder, *, batch):
    """(path of the denoiser's graph, its calls of one run as numpy arrays by input)."""
    conditions = generator.conditions(2)
    parts = find_components(generator, conditions, plan, batch=batch, any_size=False)
    part = next(part for part in parts if part.role == "denoiser")
    path = folder / "denoiser" / "model.onnx"
    module = Flat(getattr(generator.pipeline, part.attribute), part).eval()
    export_graph(module, part.flat_inputs(), list(part.outputs), path, free=part.free, opset=20)
    calls = generator.record(conditions, seeds=[0, 1], plan=plan)
    return path, [{name: tensor.numpy() for name, tensor in flatten_inputs(call.inputs).items()} for call in calls]


def session_of(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def run(session, call):
    return session.run(None, {item.name: call[item.name] for item in session.get_inputs()})[0]


def products(model):
    return sum(Counter(node.op_type for node in model.graph)[name] for name in PRODUCTS)


def folded(path, calls):
    """The models before and after, how many tables, and the timesteps."""
    before, after = ir.load(path), ir.load(path)
    timesteps = [float(call["timestep"].reshape(-1)[0]) for call in calls]
    return before, after, fold_timesteps(after, timesteps), timesteps


@pytest.mark.parametrize("batch", [None, 2])
def test_the_same_numbers_with_fewer_products(any_generator, plan, tmp_path, batch):
    path, calls = graph_of(any_generator, plan, tmp_path, batch=batch)
    before, after, count, _ = folded(path, calls)
    assert count > 0
    assert products(after) < products(before)
    assert [value.name for value in after.graph.inputs] == [value.name for value in before.graph.inputs]
    old, new = session_of(before), session_of(after)
    for call in calls:
        np.testing.assert_allclose(run(new, call), run(old, call), rtol=1e-4, atol=1e-5)


def test_products_of_groups_of_codes_are_tables_too(dit, context, plan, tmp_path):
    torch.manual_seed(0)
    wide = dict(dit.denoiser.config) | {"num_attention_heads": 4, "attention_head_dim": 8}  # 32 channels fill a group
    dit.pipeline.transformer = DiTTransformer2DModel.from_config(wide).eval()
    settings = WeightsConfig(layers=("*timestep_embedder*", "*norm1.linear"), bits=4, group=32)
    Weights(settings).apply(dit, context(dit))
    path, calls = graph_of(dit, plan, tmp_path, batch=None)
    before, after, count, _ = folded(path, calls)
    assert "MatMulNBits" in {node.op_type for node in before.graph}
    assert count > 0
    assert products(after) < products(before)
    np.testing.assert_allclose(
        run(session_of(after), calls[1]), run(session_of(before), calls[1]), rtol=1e-4, atol=1e-5
    )


def test_rows_of_a_batch_have_timesteps_of_their_own(dit, plan, tmp_path):
    path, calls = graph_of(dit, plan, tmp_path, batch=None)
    before, after, _, timesteps = folded(path, calls)
    rows = len(calls[0]["timestep"])
    mixed = calls[0] | {"timestep": np.resize(np.float32(timesteps[::-1]), rows)}
    assert len(set(mixed["timestep"].tolist())) > 1
    found, wanted = run(session_of(after), mixed), run(session_of(before), mixed)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(wanted - run(session_of(before), calls[0])).max() > 1e-3  # rows do depend on their timestep


def test_another_timestep_takes_the_nearest_row(dit, plan, tmp_path):
    path, calls = graph_of(dit, plan, tmp_path, batch=None)
    before, after, _, timesteps = folded(path, calls)
    first = calls[0]["timestep"]
    between = calls[0] | {"timestep": (first - (timesteps[0] - timesteps[1]) / 4).astype(np.float32)}
    np.testing.assert_array_equal(run(session_of(after), between), run(session_of(after), calls[0]))
    apart = run(session_of(before), between) - run(session_of(before), calls[0])
    assert np.abs(apart).max() > 1e-4  # which is why the engine refuses it


class Plain(nn.Module):
    def forward(self, *tensors):
        return (tensors[0] @ tensors[0].mT,)


def test_a_graph_without_a_timestep_stays(tmp_path):
    path = tmp_path / "model.onnx"
    export_graph(Plain(), {"sample": torch.ones(2, 3)}, ["y"], path, free={}, opset=20)
    model = ir.load(path)
    assert fold_timesteps(model, [1.0, 2.0]) == 0
    assert [node.op_type for node in model.graph] == [node.op_type for node in ir.load(path).graph]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_an_engine_for_one_plan_takes_no_other(dit, plan, tmp_path, relative, target):
    settings = ExportConfig(target=target, timesteps="plan")
    run = {"conditions": [1, 2], "seeds": [0, 1]}
    wanted = dit.sample(**run, plan=plan).latents
    export(dit, tmp_path, settings, plan=plan, conditions=run["conditions"])
    engine = Generator(load(tmp_path))
    found = engine.sample(**run, plan=plan).latents
    assert relative(found, wanted) < 1e-3
    with pytest.raises(EngineError, match=r"exported for timesteps 999, .* allowed: the sampling plan of its recipe"):
        engine.sample(**run, plan=replace(plan, steps=plan.steps + 2))


@pytest.mark.parametrize("size", ["static", "dynamic"])
def test_a_run_of_two_steps_may_start_elsewhere(sd, tmp_path, relative, size):
    run = {"conditions": ["a red circle", "two squares"], "seeds": [0, 1]}
    plan = SamplingPlan(steps=3, guidance_scale=3.0)
    sd.use_scheduler("DDIMScheduler")
    sd.pipeline.scheduler.register_to_config(timestep_spacing="leading")
    starts = [sd.record(**run, plan=replace(plan, steps=steps))[0].inputs["timestep"].item() for steps in (2, 3)]
    assert abs(starts[0] - starts[1]) > 100  # what is recorded for the export is no step of the plan
    wanted = sd.sample(**run, plan=plan).latents
    settings = ExportConfig(target="openvino", timesteps="plan", size=size)
    export(sd, tmp_path, settings, plan=plan, conditions=run["conditions"])
    assert relative(Generator(load(tmp_path)).sample(**run, plan=plan).latents, wanted) < 1e-3


@pytest.mark.parametrize(
    ("told", "good"), [(500.0, True), (torch.tensor([500, 250]), True), (375.0, False), (0, False)]
)
def test_only_known_timesteps_are_taken(told, good):
    if good:
        check_timesteps(told, (500.0, 250.0))
        return
    with pytest.raises(EngineError, match="called with"):
        check_timesteps(told, (500.0, 250.0))


def test_timesteps_of_a_network_that_is_told_none():
    with pytest.raises(ConfigError, match="no input called timestep"):
        timesteps_of([{"sample": torch.ones(1)}])
    assert timesteps_of([{"timestep": torch.tensor([step])} for step in (9.0, 9.0, 4.0)]) == [9.0, 4.0]
