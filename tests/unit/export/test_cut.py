"""The pieces of a cut graph compute what the whole one does, and leave out what they should."""

import dataclasses
import functools
import json
import logging
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from diffpress.caching import CachePolicy, Caches, CacheState, Cut, cached, extrapolate
from diffpress.errors import ArtifactError, ConfigError, EngineError, ParityError
from diffpress.export.build import MANIFEST, check_export, export
from diffpress.export.components import find_components
from diffpress.export.cut import PIECES, cut_piece, eight_bit_products, export_pieces, piece_path
from diffpress.export.graph import clean
from diffpress.export.load import load
from diffpress.export.modules import CachedEngineDenoiser
from diffpress.export.parity import ROUNDING, compare
from diffpress.export.replay import amplification, prove_cache
from diffpress.export.scopes import read_sources
from diffpress.export.session import open_session
from diffpress.export.settings import ExportConfig
from diffpress.generator import Generator, SamplingPlan, argument_names
from diffpress.prune.cuts import find_cut
from diffpress.prune.reuse import Runs
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.weights import Weights, WeightsConfig

PLAN = SamplingPlan(steps=5, guidance_scale=3.0)
BLOCKS = Cut(start="b", end="c", arguments=("hidden_states",), origin="a", skipped=("b", "c"))
LAYER = Cut(end="c", skipped=("c",))

TRACED = """
<ir_version: 10, opset_import: ["" : 20]>
traced (float[n] x, float[n] t, float[n] y) => (float[n] out_sample, float[n] {outputs})
<float one = {{1.0}}, float two = {{2.0}}, float three = {{3.0}}> {{
    origin = Add(x, one)
    {start} = Mul(origin, two)
    inner = Mul({start}, three)
    also = Mul(inner, y)
    {end} = Add(also, t)
    out_sample = Mul({end}, t)
}}
"""


def traced(**names):
    """out = (2 (x + 1) 3 y + t) t; h_a = 2 (x + 1), h_b = 6 (x + 1) y + t."""
    names = {"outputs": "origin, float[n] h_a, float[n] h_b", "start": "h_a", "end": "h_b"} | names
    model = ir.from_proto(onnx.parser.parse_model(TRACED.format(**names)))
    renamed = {"h_a": "start.0", "h_b": "end.0"}  # the parser takes no dots
    for value in model.graph.outputs:
        value.name = renamed.get(value.name, value.name)
    return model


def made(piece, cut=BLOCKS):
    model = traced()
    cut_piece(model, cut, piece)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def compute(proto, **inputs):
    names = [value.name for value in proto.graph.input]
    outputs = ReferenceEvaluator(proto).run(None, {name: np.float32([inputs[name]]) for name in names})
    return {value.name: float(output[0]) for value, output in zip(proto.graph.output, outputs, strict=True)}


def names_of(proto):
    return [value.name for value in proto.graph.input]


def test_pieces_of_a_schedule():
    full, reuse = made("full"), made("reuse")
    assert compute(full, x=1, t=5, y=7) == {"out_sample": (12 * 7 + 5) * 5, "cache.0": 12 * 7 + 5 - 4}
    assert names_of(reuse) == ["x", "t", "cache.0"]
    assert compute(reuse, x=2, t=3, **{"cache.0": 85}) == {"out_sample": (6 + 85) * 3}
    assert len(reuse.graph.node) == 4
    assert {item.name for item in reuse.graph.initializer} == {"one", "two"}


def test_pieces_of_a_test():
    whole, first, rest, last = (made(piece) for piece in ("", "first", "rest", "last"))
    assert list(compute(whole, x=1, t=5, y=7)) == ["out_sample"]
    assert names_of(first) == ["x"]
    assert compute(first, x=1) == {"start.0": 4, "residual": 2}
    assert names_of(rest) == ["t", "y", "start.0"]
    assert compute(rest, t=5, y=7, **{"start.0": 4}) == {"out_sample": 89 * 5, "cache.0": 85}
    assert names_of(last) == ["t", "start.0", "cache.0"]
    assert compute(last, t=3, **{"start.0": 6, "cache.0": 85}) == {"out_sample": 91 * 3}
    assert [node.op_type for node in last.graph.node] == ["Add", "Mul"]


def test_a_feature_that_is_kept_itself():
    full, reuse = made("full", LAYER), made("reuse", LAYER)
    assert compute(full, x=1, t=5, y=7) == {"out_sample": 89 * 5, "cache.0": 89}
    assert names_of(reuse) == ["t", "cache.0"]
    assert compute(reuse, t=3, **{"cache.0": 89}) == {"out_sample": 89 * 3}


@pytest.mark.parametrize("cut", [BLOCKS, LAYER])
def test_nodes_of_pieces_have_a_known_submodule(cut, tmp_path):
    for piece in ("", *PIECES["schedule" if cut is LAYER else "threshold"]):
        model = traced()
        clean(model)
        cut_piece(model, cut, piece)
        ir.save(model, tmp_path / "piece.onnx")
        assert all(source.module is not None for source in read_sources(tmp_path / "piece.onnx").nodes)
        model.graph.outputs[-1].producer().name = "b/Mul_other"
        ir.save(model, tmp_path / "piece.onnx")
        assert any(source.module is None for source in read_sources(tmp_path / "piece.onnx").nodes)


def test_an_end_that_nothing_reads():
    model = traced(end="h_b", outputs="origin, float[n] h_a, float[n] out_copy")
    model.graph.outputs[-1].name = "end.0"
    with pytest.raises(EngineError, match="nothing in the exported graph reads the output of c"):
        cut_piece(model, BLOCKS, "reuse")


# with networks


def policy_of(generator, computed, kind="schedule", **changes):
    runs = Runs(generator, SimpleNamespace(conditions=generator.conditions(1), seeds=[0], plan=PLAN, batch_size=1), 1)
    cut = find_cut(generator, generator.conditions(1), PLAN, keep_first=None, keep_last=None, branch=None)
    return CachePolicy(**{"cut": cut, "kind": kind, "timesteps": runs.timesteps, "computed": computed} | changes)


REUSING = (True, False, True, False, False)
TESTED = {"computed": (True, *[False] * 4), "kind": "threshold", "threshold": 0.6, "most": 2}
CASES = {"dit": {"computed": REUSING}, "dit tested": TESTED, "sd": {"computed": REUSING}}


@pytest.fixture(scope="module")
def cut_engines(dit_folder, sd_folder, tmp_path_factory):
    """``cut_engines(case)``: a generator with its policy, and a folder with its denoiser's pieces, made once."""

    @functools.cache
    def make(case):
        generator = Generator.load(dit_folder if "dit" in case else sd_folder)
        generator.cache = policy_of(generator, **CASES[case])
        parts = find_components(generator, generator.conditions(2), PLAN, batch=None, any_size=False)
        part, folder = next(part for part in parts if part.role == "denoiser"), tmp_path_factory.mktemp("cut")
        written = export_pieces(
            generator.denoiser, part, generator.cache, folder / part.folder, opset=20, for_onnxruntime_cpu=False
        )
        return generator, folder, written

    return make


def prove(generator, folder, plan=PLAN, **settings):
    return prove_cache(generator, folder, ExportConfig(**settings), generator.conditions(2), plan)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("case", CASES)
def test_engines_follow_torch(cut_engines, case, target):
    generator, folder, written = cut_engines(case)
    parity = prove(generator, folder, target=target)
    assert parity.calls == 5
    assert parity.error < 1e-5
    folder = folder / generator.denoiser_name
    found = {path.relative_to(folder).parent.as_posix() for path in written}
    assert found == {".", *PIECES[generator.cache.kind]}
    assert not list(folder.glob("traced*"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dit", "dit tested"])
def test_what_reuses_nothing_is_the_plain_network(cut_engines, case):
    generator, folder, _ = cut_engines(case)
    changes = {"threshold": 0.0} if "tested" in case else {"computed": (True,) * 5}
    plain = generator.record(generator.conditions(1), seeds=[0], plan=PLAN)
    sessions = {
        piece: open_session(piece_path(folder / "transformer", piece), target="onnxruntime")
        for piece in PIECES[generator.cache.kind]
    }
    policy = dataclasses.replace(generator.cache, **changes)
    engine = CachedEngineDenoiser(sessions, {}, argument_names(generator.denoiser), policy)
    for call in plain:
        torch.testing.assert_close(engine(**call.inputs).sample, call.output, rtol=1e-4, atol=1e-4)
    assert engine.caches.state.history == [True] * 5


def named_in(path):
    """All names of nodes and weights, and the operators."""
    graph = onnx.load(path).graph
    names = [item.name for item in graph.initializer] + [node.name for node in graph.node]
    return " ".join(names), [node.op_type for node in graph.node]


@pytest.mark.slow
def test_the_short_graph_holds_the_shallow_layers_only(cut_engines):
    folder = cut_engines("sd")[1] / "unet"
    named, operators = named_in(piece_path(folder, "reuse"))
    assert all(name in named for name in ("up_blocks.1.resnets.1", "conv_in", "conv_out", "time_embedding"))
    for left_out in ("mid_block", "up_blocks.0", "up_blocks.1.resnets.0", "down_blocks.1", "attn"):
        assert left_out not in named
        assert left_out in named_in(piece_path(folder, ""))[0]
    assert not {"If", "Loop"} & set(operators)
    assert operators.count("Conv") == 5  # in, two and a shortcut, out
    folder = cut_engines("dit")[1] / "transformer"
    named = named_in(piece_path(folder, "reuse"))[0]
    assert "transformer_blocks.0" in named
    assert "transformer_blocks.1" not in named
    assert "transformer_blocks.1" in named_in(piece_path(folder, ""))[0]


@pytest.mark.slow
def test_a_wrong_sign_in_a_piece_is_caught(cut_engines, tmp_path):
    generator, folder, _ = cut_engines("dit")
    copy = shutil.copytree(folder, tmp_path / "copy")
    model = onnx.load(copy / "transformer/full/model.onnx")
    node = next(node for node in model.graph.node if node.output[0] == "cache.0")
    node.input[:] = node.input[::-1]
    onnx.save(model, copy / "transformer/full/model.onnx")
    with pytest.raises(ParityError, match="transformer, cached: the engine differs from torch"):
        prove(generator, copy)


@pytest.mark.slow
def test_a_wrong_sign_in_the_extrapolation_is_caught(cut_engines, monkeypatch):
    generator, folder, _ = cut_engines("dit")
    linear = dataclasses.replace(generator.cache, computed=(True, True, False, False, True), order=1)
    monkeypatch.setattr(generator, "cache", linear)
    assert prove(generator, folder).error < 1e-5

    def spoiled(*args, **kwargs):  # torch has run by now
        monkeypatch.setattr("diffpress.caching.extrapolate", lambda terms, steps: extrapolate(terms, -steps))
        return compare(*args, **kwargs)

    monkeypatch.setattr("diffpress.export.replay.compare", spoiled)
    with pytest.raises(ParityError, match="differs from torch"):
        prove(generator, folder)


@pytest.mark.slow
def test_a_policy_for_another_schedule_is_not_built(cut_engines, monkeypatch):
    generator, folder, _ = cut_engines("dit")
    with pytest.raises(
        ConfigError, match=r"was fitted for the timesteps 999, .* but this run has .* too; allowed: the"
    ):
        prove(generator, folder, plan=dataclasses.replace(PLAN, steps=4))
    known = generator.cache.timesteps
    finer = sorted({*known, *(timestep - 1 for timestep in known)}, reverse=True)  # twice as many steps
    monkeypatch.setattr(
        generator, "cache", dataclasses.replace(generator.cache, timesteps=tuple(finer), computed=REUSING * 2)
    )
    with pytest.raises(ConfigError, match=r"was fitted for the timesteps 999, 998, .* but this run leaves some out"):
        prove(generator, folder)


def test_what_cannot_be_cut_is_refused_first(dit, sd):
    dit.cache = CachePolicy(cut=LAYER, kind="schedule", timesteps=(1.0,), computed=(True,))
    with pytest.raises(ConfigError, match="cut at c, which DiTTransformer2DModel does not have"):
        check_export(dit, ExportConfig())
    sd.cache = policy_of(sd, REUSING)
    with pytest.raises(ConfigError, match="size 'dynamic' with a feature cache on target tensorrt; allowed: static"):
        check_export(sd, ExportConfig(target="tensorrt", size="dynamic"))


# whole engines


@pytest.fixture(scope="module")
def int8_built(dit_folder, tmp_path_factory, context):
    """A DiT in 8 bits whose tail and head run in every step."""
    generator = Generator.load(dit_folder)
    given = dataclasses.replace(context(generator, "openvino"), plan=PLAN)
    Int8(Int8Config()).apply(generator, given)
    Weights(WeightsConfig()).apply(generator, given)  # read as floats, and so not among the products in 8 bits
    generator.cache = policy_of(generator, **TESTED)
    folder = tmp_path_factory.mktemp("cached") / "engine"
    return generator, export(generator, folder, ExportConfig(target="openvino"), plan=PLAN, conditions=given.conditions)


@pytest.fixture(scope="module")
def ddpm_built(ddpm_folder, tmp_path_factory):
    generator = Generator.load(ddpm_folder)
    generator.cache = policy_of(generator, REUSING)
    folder = tmp_path_factory.mktemp("cached") / "engine"
    return generator, export(generator, folder, ExportConfig(), plan=PLAN, conditions=generator.conditions(2))


def draw(generator, seeds=(0, 1)):
    conditions = generator.conditions(len(seeds))
    return generator.draw(conditions, seeds=list(seeds), plan=PLAN).images


@pytest.mark.slow
def test_in_8_bits(int8_built):
    built = int8_built[1]
    assert (built.quantized_layers, built.quantized_ops) == (12, 12)
    assert [item.component for item in built.parity][-1] == "transformer, cached"
    folder = built.folder / "transformer"
    weights = {piece: eight_bit_products(piece_path(folder, piece)) for piece in ("", "first", "rest", "last")}
    assert weights == {"": 12, "first": 6, "rest": 6, "last": 0}
    engine = Generator(load(built.folder))
    draw(engine)
    history = engine.denoiser.caches.states[0].history
    assert len(history) == 5
    assert 0 < sum(history) < 5


@pytest.mark.slow
@pytest.mark.parametrize("rounding", [0.0, 0.02])
def test_what_rounding_moves_along_the_run_is_allowed(int8_built, monkeypatch, rounding):
    generator, built = int8_built
    monkeypatch.setattr("diffpress.export.replay.tolerance_of", lambda *args: 1e-9)
    monkeypatch.setitem(ROUNDING, "float32", rounding)
    if rounding:
        parity = prove(generator, built.folder, target="openvino")
        assert parity.error < 1e-2 < parity.tolerance < 1
    else:
        with pytest.raises(ParityError, match=r"cached: the engine differs from torch by .*allowed: 1\.0e-09"):
            prove(generator, built.folder, target="openvino")


@pytest.mark.slow
def test_the_plain_graph_beside_the_pieces_has_one_output(ddpm_built):
    """Other loaders take the last output for the sample."""
    graph = onnx.load(ddpm_built[1].folder / "unet/model.onnx").graph
    assert [value.name for value in graph.output] == ["out_sample"]


@pytest.mark.slow
def test_a_loaded_engine_draws_what_torch_does_with_the_policy(ddpm_built, ddpm_folder, relative):
    generator, built = ddpm_built
    engine = Generator(load(built.folder))
    assert isinstance(engine.denoiser, CachedEngineDenoiser)
    with cached(generator.denoiser, generator.cache):
        expected = draw(generator)
    found = draw(engine)
    assert relative(found, expected) < 1e-4
    assert relative(draw(generator), expected) > 1e-3  # control: without the policy
    assert engine.denoiser.caches.states[0].history == list(REUSING)


@pytest.mark.slow
def test_torch_leaves_the_cores_to_the_engine(ddpm_built, monkeypatch):
    """What is kept is combined on one thread: torch's other threads would spin while the run-time wants the cores."""
    engine, seen, threads = Generator(load(ddpm_built[1].folder)), [], torch.get_num_threads()
    for name in ("store", "predict"):
        whole = getattr(CacheState, name)

        def watched(self, *args, whole=whole, name=name):
            seen.append((name, torch.get_num_threads()))
            return whole(self, *args)

        monkeypatch.setattr(CacheState, name, watched)
    torch.set_num_threads(2)
    try:
        draw(engine)
        assert set(seen) == {("store", 1), ("predict", 1)}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_no_picture_sees_another_through_the_engine(ddpm_built, monkeypatch):
    engine = Generator(load(ddpm_built[1].folder))
    alone = draw(engine, (7,))
    draw(engine, (5, 6))
    assert np.array_equal(draw(engine, (7,)), alone)
    both = draw(engine, (7, 5))
    np.testing.assert_allclose(both[:1], alone, rtol=1e-4, atol=1e-4)
    draw(engine, (5,))
    monkeypatch.setattr(Caches, "forget", lambda self: None)  # control: never cleared
    monkeypatch.setattr(CacheState, "begin", lambda self, *args: "reuse")
    monkeypatch.setattr(CacheState, "predict", lambda self: self._differences[0])
    assert not np.allclose(draw(engine, (7,)), alone, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("forgets", [True, False])
def test_a_run_that_was_ended_early_leaves_nothing(ddpm_built, monkeypatch, forgets):
    """The next may begin where it ended, as image to image does."""
    pipeline = load(ddpm_built[1].folder)
    scheduler, caches = pipeline.scheduler, pipeline.unet.caches
    if not forgets:  # control
        monkeypatch.setattr(Caches, "forget", lambda self: None)
    with monkeypatch.context() as patch:
        patch.delattr(type(scheduler), "step")
        with pytest.raises(AttributeError):
            pipeline(num_inference_steps=PLAN.steps)
    assert caches.state.history == [True]
    whole = scheduler.set_timesteps

    def from_the_second(*args, **kwargs):
        whole(*args, **kwargs)
        scheduler.timesteps = scheduler.timesteps[1:]

    monkeypatch.setattr(scheduler, "set_timesteps", from_the_second)
    pipeline(num_inference_steps=PLAN.steps)
    assert caches.state.history == ([True, *REUSING[2:]] if forgets else list(REUSING))


@pytest.mark.slow
def test_another_schedule_is_drawn_in_full_and_warns(ddpm_built, caplog, relative):
    generator, built = ddpm_built
    engine, other = Generator(load(built.folder)), dataclasses.replace(PLAN, steps=4)
    arguments = {"seeds": [3], "plan": other}
    with caplog.at_level(logging.WARNING):
        found = engine.draw([None], **arguments).images
    assert caplog.text.count("fitted for another schedule") == 1
    assert relative(found, generator.draw([None], **arguments).images) < 1e-4


@pytest.mark.slow
def test_a_manifest_or_a_piece_that_is_broken(ddpm_built, tmp_path):
    copy = shutil.copytree(ddpm_built[1].folder, tmp_path / "copy")
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"cache": {"kind": "schedule"}}))
    with pytest.raises(ArtifactError, match="cache is not a policy"):
        load(copy)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    (copy / "unet/reuse/model.onnx").unlink()
    with pytest.raises(ArtifactError, match="not a whole one"):
        load(copy)


class Fake:
    """A session of numbers: ``rest`` and the whole add the condition."""

    provider = "fake"

    def __init__(self, inputs, outputs, compute):
        self.inputs, self.outputs, self._compute = dict.fromkeys(inputs, torch.float32), outputs, compute

    def __call__(self, inputs):
        return self._compute(*(inputs[name] for name in self.inputs))


def test_branches_that_are_called_in_turns_have_caches_of_their_own():
    full = Fake(["sample", "y"], ["out_sample", "cache.0"], lambda x, y: [x + y, y])
    reuse = Fake(["sample", "cache.0"], ["out_sample"], lambda x, kept: [x + 10 * kept])
    policy = CachePolicy(cut=LAYER, kind="schedule", timesteps=(3.0, 2.0), computed=(True, False))
    engine = CachedEngineDenoiser({"full": full, "reuse": reuse}, {}, ["sample", "timestep", "y"], policy)
    found = {}
    for timestep in (3.0, 2.0):
        for name, y in (("cond", 1.0), ("uncond", 2.0)):
            with engine.cache_context(name):
                time = torch.tensor([timestep])
                found[timestep, name] = float(engine(torch.zeros(1), timestep=time, y=torch.tensor([y])).sample)
    assert found == {(3.0, "cond"): 1, (3.0, "uncond"): 2, (2.0, "cond"): 10, (2.0, "uncond"): 20}


def test_extrapolation_amplifies_roundings():
    def amplified(*computed, order):
        times = tuple(float(step) for step in range(len(computed), 0, -1))
        return amplification(
            CachePolicy(cut=LAYER, kind="schedule", timesteps=times, computed=tuple(map(bool, computed)), order=order)
        )

    assert amplified(1, 1, 0, 0, order=0) == 1
    assert amplified(1, 1, 1, 1, order=2) == 1
    assert amplified(1, 1, 0, 1, order=1) == pytest.approx(5**0.5)  # 2 F_1 - F_0
    assert amplified(1, 0, 1, 0, order=1) == pytest.approx((1.5**2 + 0.5**2) ** 0.5)  # 3/2 F_2 - 1/2 F_0
    assert amplified(1, 1, 0, 0, order=1) == pytest.approx(13**0.5)  # two steps after: 3 F_1 - 2 F_0
