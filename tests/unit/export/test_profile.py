"""Where time goes: every operator has its submodule and kind, nothing is lost, and what is not known is said."""

import time
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from families import make
from tiny import make_flux
from torch import nn
from torch.nn import functional as F

import diffpress
from diffpress.errors import ConfigError, EngineError
from diffpress.export.attribution import KINDS, Layer, attribute
from diffpress.export.build import export_part
from diffpress.export.components import find_components
from diffpress.export.graph import export_graph
from diffpress.export.profile import (
    EngineProfile,
    check_timed,
    latency_ratio,
    latency_table,
    open_denoiser,
    predicted_latency,
    profile,
)
from diffpress.export.scopes import Source, SourceGraph, common, read_sources
from diffpress.export.session import open_session
from diffpress.export.settings import ExportConfig
from diffpress.export.trace import RuntimeNode
from diffpress.generator import Generator
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import Activation, QuantizedConv2d, QuantizedLinear, quantized
from diffpress.targets import TARGETS

TARGET = pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """One layer of each kind."""

    def __init__(self, *, int8=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.group = nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.norm, self.inner, self.act, self.out = nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        self.attention = Attention()
        if int8:
            activation = Activation(TARGETS["onnxruntime"])
            activation.set_range(-4, 4, TARGETS["onnxruntime"])
            self.inner = quantized(self.inner, activation)

    def forward(self, *tensors):
        hidden = self.group(self.conv(tensors[0])).flatten(2).transpose(1, 2)  # [batch, 64, 16]
        return self.out(self.act(self.inner(self.norm(self.attention(hidden)))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        parts = [layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


class Network(nn.Module):
    """What `Flat` is to a part: the attribute that holds it is called module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *tensors):
        return self.module(*tensors)


def write(module, path, target, inputs=None):
    on_cpu = target == "onnxruntime"
    network = Network(module).eval()
    export_graph(network, inputs or {"x": X}, ["y"], path, free={}, opset=20, for_onnxruntime_cpu=on_cpu)
    return path


def all_layers(session, inputs):
    """Attribution of every operator, those too that took no time."""
    nodes = [replace(node, samples_ms=np.ones(1)) for node in session.trace(inputs, rounds=1).nodes]
    return attribute(nodes, read_sources(session.path))


def export_denoiser(generator, given, folder, target):
    """(session, flat inputs) of the denoiser alone."""
    part = next(
        part
        for part in find_components(generator, given.conditions, given.plan, batch=None, any_size=False)
        if part.role == "denoiser"
    )
    export_part(generator, part, folder, ExportConfig(target=target))
    return open_session(folder / part.folder / "model.onnx", target=target), part.flat_inputs()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "target", "activations"),
    [
        ("dit", "onnxruntime", "static"),
        ("dit", "openvino", None),
        ("dit", "openvino", "dynamic"),
        ("sd", "onnxruntime", None),
        ("sd", "openvino", "static"),
        ("sd", "openvino", "dynamic"),
    ],
)
def test_every_operator_of_a_denoiser_has_its_submodule(family, activations, target, request, context, tmp_path):
    generator = request.getfixturevalue(family)
    given = context(generator, target)
    if activations:
        Int8(Int8Config(activations=activations)).apply(generator, given)
    session, inputs = export_denoiser(generator, given, tmp_path, target)
    layers = all_layers(session, inputs)
    assert all(layer.modules is not None for layer in layers)
    modules = dict(generator.denoiser.named_modules())
    assert {name for layer in layers for name in layer.modules} <= modules.keys()
    for kind, classes in (("linear", (nn.Linear, QuantizedLinear)), ("convolution", (nn.Conv2d, QuantizedConv2d))):
        found = {name for layer in layers if layer.kind == kind for name in layer.modules}
        assert found == {name for name, module in modules.items() if isinstance(module, classes)}
    attention = {name for layer in layers if layer.kind == "attention" for name in layer.modules}
    assert attention == {name for name in modules if name.rpartition(".")[2].startswith("attn")}


@TARGET
@pytest.mark.parametrize("int8", [False, True])
def test_kinds_of_a_known_graph(target, int8, tmp_path):
    path = write(Small(int8=int8), tmp_path / "model.onnx", target)
    layers = all_layers(open_session(path, target=target), {"x": X})
    kinds = {}
    for layer in layers:
        for name in layer.modules:
            kinds.setdefault(name, set()).add(layer.kind)
    wanted = {"conv": "convolution", "group": "norm", "norm": "norm", "inner": "linear", "out": "linear"}
    wanted |= {"attention": "attention"} | {f"attention.{name}": "linear" for name in ("query", "key", "value")}
    assert {name for name, kind in wanted.items() if kind in kinds[name]} == set(wanted)
    assert {layer.kind for layer in layers} <= set(KINDS)
    if target == "onnxruntime":
        assert kinds["act"] == {"elementwise"}
        assert ("quantize" in kinds["inner"]) == int8


@TARGET
def test_nothing_is_lost(target, tmp_path):
    session = open_session(write(Small(), tmp_path / "model.onnx", target), target=target)
    trace = session.trace({"x": X}, rounds=4)
    assert {len(node.samples_ms) for node in trace.nodes} == {len(trace.calls_ms)} == {len(trace.profiled_ms)} == {4}
    layers = attribute(trace.nodes, read_sources(session.path))
    executed = sum(max(0.0, float(np.median(node.samples_ms))) for node in trace.nodes)
    assert executed > 0
    assert sum(layer.ms for layer in layers) == pytest.approx(executed)
    found = profile(session, {"x": X}, rounds=4)
    assert found.unattributed_ms <= 0.05 * found.layers_ms
    for parts in (found.times_ms(), found.by_kind().values(), found.own().values()):
        assert sum(parts) == pytest.approx(found.call_ms)


@TARGET
def test_a_planted_slow_layer_is_the_slowest(target, tmp_path):
    network = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)), nn.Linear(64, 4096), nn.Linear(4096, 64))
    network = nn.Sequential(network, *(nn.Linear(64, 64) for _ in range(3)))
    inputs = {"x": torch.ones(512, 64)}
    found = profile(open_session(write(network, tmp_path / "model.onnx", target, inputs), target=target), inputs)
    own = found.own()
    assert set(sorted(own, key=own.get)[-2:]) == {"0.3", "0.4"}
    assert latency_table(found)["0"] > found.call_ms / 2


@TARGET
def test_names_that_are_not_the_files_own_lose_the_attribution(target, tmp_path, caplog):
    path = write(Small(), tmp_path / "model.onnx", target)
    file = onnx.load(path)
    others = [node for node in file.graph.node if node.op_type != "Conv"]
    names = [node.name for node in others]
    for node, name in zip(others, [*names[1:], names[0]], strict=True):
        node.name = name
    onnx.save(file, tmp_path / "shuffled.onnx")
    layers = all_layers(open_session(tmp_path / "shuffled.onnx", target=target), {"x": X})
    assert {layer.modules for layer in layers if layer.kind == "linear"} == {None}
    assert [layer.modules for layer in layers if layer.kind == "convolution"] == [("conv",)]

    for index, node in enumerate(file.graph.node):
        node.name = f"other/names_{index}"
    onnx.save(file, tmp_path / "renamed.onnx")
    found = profile(open_session(tmp_path / "renamed.onnx", target=target), {"x": X}, rounds=1)
    assert found.layers_ms > 0
    assert found.unattributed_ms == pytest.approx(found.layers_ms)
    assert found.own() == {"": pytest.approx(found.call_ms)}
    assert "100 % of the time belongs to no known submodule" in caplog.text


def made_up(**times):
    """A profile of layers called like their submodules, with these times."""
    layers = [Layer(name, "Add", "elementwise", (name.replace("_", "."),), ms) for name, ms in times.items()]
    return EngineProfile("none", 1, sum(times.values()), sum(times.values()), tuple(layers))


def test_the_table_is_additive():
    found = made_up(a=1.0, a_b=2.0, a_b_c=4.0, a_d=8.0, e=16.0)
    table, own = latency_table(found, ["a", "a.x"]), found.own()
    assert table == {"": 31, "a": 15, "a.b": 6, "a.b.c": 4, "a.d": 8, "e": 16, "a.x": 0}
    for name in table:
        children = [other for other in table if other and other != name and other.rpartition(".")[0] == name]
        assert table[name] == pytest.approx(own.get(name, 0.0) + sum(table[child] for child in children))
    assert predicted_latency(table, ["a.b"]) == 25
    assert predicted_latency(table, ["a.b.c", "a", "a.d"]) == 16  # what is inside another is not taken off twice
    assert predicted_latency(table, []) == 31
    with pytest.raises(ConfigError, match=r"a\.z: not in the latency table"):
        predicted_latency(table, ["a.z"])


def test_time_shared_by_submodules_and_time_of_none():
    layers = (Layer("both", "Add", "elementwise", ("a", "b"), 2.0), Layer("lost", "Add", "elementwise", None, 1.0))
    found = EngineProfile("none", 1, 3.0, 3.0, layers)
    assert found.own() == {"a": 1.0, "b": 1.0, "": 1.0}
    assert found.unattributed_ms == 1.0


def test_what_the_profiler_costs_is_taken_off_each_layer_alike():
    times = (1.0, 2.0, 9.0)
    layers = tuple(Layer(str(ms), "Add", "elementwise", ("a",), ms) for ms in times)
    assert EngineProfile("none", 1, 9.0, 14.0, layers).times_ms() == pytest.approx([0, 1, 8])
    scaled = EngineProfile("none", 1, 6.0, 6.0, layers).times_ms()  # the profiler costs nothing: another reason
    assert scaled == pytest.approx([0.5, 1, 4.5])
    assert EngineProfile("none", 1, 24.0, 24.0, layers).times_ms() == pytest.approx([2, 4, 18])
    assert EngineProfile("none", 1, 5.0, 5.0, ()).own() == {"": 5.0}


def chain(*modules):
    """A file's graph: a row of nodes, each reading the one before; and its nodes' names."""
    graph = SourceGraph()
    graph.add(Source("Input", "", False), outputs=["v0"])
    for index, module in enumerate(modules):
        at = graph.add(Source("Add", module, False), inputs=[f"v{index}"], outputs=[f"v{index + 1}"])
        graph.by_name[f"n{index}"] = at
    return graph


def ran(name, reads, *origins, op="Add"):
    return RuntimeNode(name, op, tuple(reads), origins, np.ones(1))


def test_a_node_without_a_name_stands_for_what_nobody_names():
    graph = chain("a", "b", "c")
    nodes = [ran("x", [], "n0"), ran("y", ["x"]), ran("z", ["y"], "n2/with/more")]
    assert [layer.modules for layer in attribute(nodes, graph)] == [("a",), ("b",), ("c",)]
    nodes[2] = ran("z", ["y"], "n2", "n1")  # b is named: what remains serves its reader
    assert [layer.modules for layer in attribute(nodes, graph)] == [("a",), ("b", "c"), ("b", "c")]
    nodes[2] = ran("z", ["y"])
    assert [layer.modules for layer in attribute(nodes, graph)] == [("a",), ("a",), ("a",)]
    assert [layer.modules for layer in attribute([ran("q", [], "elsewhere")], graph)] == [None]
    assert [layer.modules for layer in attribute([ran("q", [], "n1")], chain("a", None))] == [None]


@pytest.mark.parametrize(
    ("modules", "shared"),
    [(["a.b.c", "a.b.d"], "a.b"), (["a", "a.b"], "a"), (["a", "b"], ""), (["a", ""], ""), ([], "")],
)
def test_innermost_common_module(modules, shared):
    assert common(modules) == shared


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "target", "int8"),
    [("dit", "openvino", 1), ("flux", "onnxruntime", 0)],
)
def test_latency_of_the_denoiser_as_it_is_now(family, target, int8, request, context, tmp_path):
    torch.manual_seed(0)
    generator = Generator(make_flux()) if family == "flux" else request.getfixturevalue(family)
    given = context(generator, target, count=2)
    if int8:
        Int8(Int8Config()).apply(generator, given)
    generator.denoiser.train()
    session, inputs = open_denoiser(
        generator, ExportConfig(target=target), tmp_path, plan=given.plan, conditions=given.conditions
    )
    assert generator.denoiser.training
    names = [name for name, _ in generator.denoiser.named_modules()]
    table = latency_table(profile(session, inputs, rounds=2), names)
    assert table.keys() == set(names)
    for name in names:
        children = [other for other in names if other and other.rpartition(".")[0] == name]
        assert table[name] >= sum(table[child] for child in children) * (1 - 1e-9) >= 0
    blocks = {"dit": "transformer_blocks", "flux": "single_transformer_blocks"}[family]
    assert 0 < table[blocks] < table[""]


@pytest.mark.slow
def test_masks_that_one_prompt_does_not_need_are_filled_in(context, tmp_path):
    generator = Generator(make("qwen"))
    given = context(generator, "openvino", count=2)
    session, inputs = open_denoiser(
        generator, ExportConfig(target="openvino"), tmp_path, plan=given.plan, conditions=given.conditions
    )
    assert "encoder_hidden_states_mask" in session.inputs
    assert latency_table(profile(session, inputs, rounds=1), [""])[""] > 0


def test_the_ratio_of_two_engines_is_of_calls_in_turns():
    order = []

    def engine(name, ms):
        def call(inputs):
            order.append((name, inputs))
            time.sleep(ms / 1e3)

        return call, {"x": name}

    slow, fast = engine("slow", 8), engine("fast", 1)
    assert latency_ratio(slow, fast, rounds=4) < 0.5 < 2 < latency_ratio(fast, slow, rounds=4)
    first = order[: len(order) // 2]
    assert {inputs["x"] == name for name, inputs in first} == {True}
    assert [name for name, _ in first[::2]] == ["slow", "fast"] * (len(first) // 4)


def test_what_an_engine_for_one_plan_looks_up_takes_no_time(dit, context, tmp_path):
    given, name = context(dit, count=2), "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2"
    for timesteps, products in (("any", 1), ("plan", 0)):
        settings = ExportConfig(target="onnxruntime", timesteps=timesteps)
        session, inputs = open_denoiser(
            dit, settings, tmp_path / timesteps, plan=given.plan, conditions=given.conditions
        )
        layers = profile(session, inputs, rounds=1).layers
        found = [layer for layer in layers if layer.modules == (name,) and layer.op in ("MatMul", "Gemm")]
        assert len(found) == products, [layer.modules for layer in layers]


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"target": "onnxruntime", "providers": ("CPUExecutionProvider",)}, None),
        ({"target": "openvino"}, None),
        ({"target": "openvino", "providers": ("GPU",)}, "openvino on GPU"),
        ({"target": "onnxruntime", "providers": ("CUDAExecutionProvider",)}, "onnxruntime on CUDAExecutionProvider"),
        ({"target": "tensorrt"}, "tensorrt"),
    ],
)
def test_a_recipe_that_needs_the_time_of_layers(settings, where, dit_folder, tmp_path):
    recipe = {"stages": [{"prune.width": {"latency": 0.5}}], "export": settings, "evaluate": {"samples": 2}}
    if where is None:
        check_timed("prune.width", ExportConfig(**settings))
    else:
        with pytest.raises(ConfigError, match=f"prune.width: needs the time of each layer, which target {where} does"):
            diffpress.compress(dit_folder, recipe, tmp_path / "out")
        assert not (tmp_path / "out/stages").exists()


@TARGET
def test_what_cannot_be_profiled(target, tmp_path):
    session = open_session(write(Small(), tmp_path / "model.onnx", target), target=target)
    with pytest.raises(ConfigError, match="rounds is 0; allowed: 1 or more"):
        profile(session, {"x": X}, rounds=0)
    with pytest.raises(EngineError, match="refuses x"):
        profile(session, {"x": X[:1]}, rounds=1)

    class Other:
        provider = "TensorRT 11"

    with pytest.raises(EngineError, match="TensorRT 11: its layers cannot be timed; allowed: onnxruntime and openvino"):
        profile(Other(), {"x": X})
    if target == "openvino":
        session._device = "GPU"
    else:
        session._session = type("Elsewhere", (), {"get_providers": lambda self: ["CUDAExecutionProvider"]})()
    with pytest.raises(EngineError, match=r"runs on (GPU|CUDAExecutionProvider); operators are timed on"):
        profile(session, {"x": X})
