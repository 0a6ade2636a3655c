"""From a quantized pipeline to a folder, and back to a pipeline that draws the same pictures."""

import dataclasses
import json
import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from families import make

from diffpress.errors import (
    ArtifactError,
    ConfigError,
    EngineError,
    MissingDependencyError,
    ParityError,
    PrecisionError,
)
from diffpress.export import build, settings
from diffpress.export.build import check_export, export
from diffpress.export.components import Flat, find_components, flatten_inputs
from diffpress.export.graph import export_graph
from diffpress.export.load import MANIFEST, load
from diffpress.export.settings import ExportConfig
from diffpress.generator import Generator
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import Activation
from diffpress.sampling import SamplingPlan
from diffpress.targets import find_target


def build_int8(folder, output, context, target, size="static", dot_products=None):
    """(fake-quantized generator, what was built)."""
    generator = Generator.load(folder)
    given = dataclasses.replace(context(generator), target=find_target(target, dot_products=dot_products))
    Int8(Int8Config()).apply(generator, given)
    settings = ExportConfig(target=target, size=size, dot_products=dot_products)
    built = export(generator, output, settings, plan=given.plan, conditions=given.conditions)
    return generator, built


@pytest.fixture(scope="module")
def dit_built(dit_folder, tmp_path_factory, context):
    return build_int8(dit_folder, tmp_path_factory.mktemp("dit") / "engine", context, "onnxruntime")


@pytest.fixture(scope="module")
def sd_built(sd_folder, tmp_path_factory, context):
    return build_int8(sd_folder, tmp_path_factory.mktemp("sd") / "engine", context, "openvino", "dynamic")


@pytest.fixture(scope="module")
def ddpm_built(ddpm_folder, tmp_path_factory, context):
    """The least of the three to export: one part."""
    return build_int8(ddpm_folder, tmp_path_factory.mktemp("ddpm") / "engine", context, "onnxruntime")


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def part(name):
    return {f"{name}/model.onnx", f"{name}/config.json"}


def assert_same_pictures(built, float_folder, plan, relative):
    """Some calls are the same to rounding of floats; no picture is further off than quantization itself takes it.

    (Where a float falls on the other side of a rounding, later roundings follow: in 8 bits tiny networks are chaotic.)
    """
    quantized, engine = built[0], Generator(load(built[1].folder))
    conditions, seeds = quantized.conditions(4), [3, 1, 4, 2]
    runs = zip(conditions, seeds, strict=True)
    calls = [call for condition, seed in runs for call in quantized.record([condition], seeds=[seed], plan=plan)]
    outputs = [engine.denoiser.session(flatten_inputs(call.inputs))[0] for call in calls]
    assert min(relative(output, call.output) for output, call in zip(outputs, calls, strict=True)) < 1e-5
    from_torch, from_engine, from_float, other = (
        generator.sample(conditions, seeds=numbers, plan=plan, batch_size=2)
        for generator, numbers in (
            (quantized, seeds),
            (engine, seeds),
            (Generator.load(float_folder), seeds),
            (engine, seeds[::-1]),
        )
    )
    for kind in ("images", "latents"):
        expected = getattr(from_torch, kind)
        if expected is None:
            continue
        error, noise, wrong = (
            [relative(a, b) for a, b in zip(getattr(samples, kind), expected, strict=True)]
            for samples in (from_engine, from_float, other)
        )
        assert max(error) < 2 * max(noise) < 0.2 < min(wrong)


@pytest.mark.slow
def test_transformer_on_onnxruntime(dit_built, dit_folder, plan, relative):
    built = dit_built[1]
    assert (built.quantized_layers, built.quantized_ops) == (12, 12)
    assert {item.component for item in built.parity} == {"transformer", "vae_decoder", "vae_encoder"}
    assert all(item.error <= item.tolerance for item in built.parity)
    assert_same_pictures(dit_built, dit_folder, plan, relative)


@pytest.mark.slow
def test_unet_with_text_encoder_on_openvino(sd_built, sd_folder, plan, relative):
    built = sd_built[1]
    assert built.quantized_ops >= built.quantized_layers > 40
    calls = {item.component: item.calls for item in built.parity}
    assert calls == {"text_encoder": 1, "unet": 5, "vae_decoder": 2, "vae_encoder": 2}  # one each at another size
    assert_same_pictures(sd_built, sd_folder, plan, relative)
    pipeline = load(built.folder)
    assert set(pipeline.providers) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert all(provider.startswith("OpenVINO") for provider in pipeline.providers.values())


@pytest.mark.slow
def test_unconditional_in_pixels(ddpm_built, ddpm_folder, plan, relative):
    assert_same_pictures(ddpm_built, ddpm_folder, plan, relative)


@pytest.mark.slow
def test_layout_of_a_class_conditional_engine(dit_built):
    folder = dit_built[1].folder
    alone = {"model_index.json", "diffpress.json", "scheduler/scheduler_config.json"}
    assert files_below(folder) == alone | part("transformer") | part("vae_decoder") | part("vae_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline"
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    text = "".join(path.read_text() for path in folder.rglob("*.json"))
    assert "DiTTransformer2DModel" in text
    assert str(dit_built[0].source) not in text  # where the checkpoint lay is nobody's business


@pytest.mark.slow
def test_layout_of_a_text_to_image_engine(sd_built):
    found = files_below(sd_built[1].folder)
    tokenizer = {name for name in found if name.startswith("tokenizer/")}
    assert "tokenizer/tokenizer_config.json" in tokenizer
    parts = set().union(*(part(name) for name in ("text_encoder", "unet", "vae_decoder", "vae_encoder")))
    assert found - tokenizer == {"model_index.json", "diffpress.json", "scheduler/scheduler_config.json"} | parts


@pytest.mark.slow
def test_class_names_survive(dit_built):
    engine = Generator(load(dit_built[1].folder))
    assert engine.conditions(2, ["owl", "fox"]) == [2, 3]


@pytest.mark.slow
def test_the_same_denoiser_gives_the_same_bytes(dit_built, plan, tmp_path):
    generator, built = dit_built
    parts = find_components(generator, generator.conditions(2), plan, batch=None, any_size=False)
    again = next(item for item in parts if item.role == "denoiser")
    flat, path = Flat(generator.denoiser, again).eval(), tmp_path / "transformer/model.onnx"
    export_graph(
        flat,
        again.flat_inputs(),
        list(again.outputs),
        path,
        free=again.free,
        opset=ExportConfig().opset,
        for_onnxruntime_cpu=True,
    )
    assert path.read_bytes() == (built.folder / "transformer/model.onnx").read_bytes()


@pytest.mark.slow
def test_what_an_engine_was_made_without_is_refused(sd_built, plan):
    """A ControlNet's residuals, or a LoRA's scale, would have no effect."""
    pipeline = load(sd_built[1].folder)
    draw = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "np"}
    pipeline(**draw, cross_attention_kwargs={})
    with pytest.raises(EngineError, match="made without cross_attention_kwargs, which the pipeline gave"):
        pipeline(**draw, cross_attention_kwargs={"scale": 0.5})
    calls = Generator(pipeline).record(["a cat"], seeds=[0], plan=plan, limit=1)[0].inputs
    with pytest.raises(EngineError, match="made without mid_block_additional_residual"):
        pipeline.unet(**calls, mid_block_additional_residual=torch.zeros(1))
    with pytest.raises(EngineError, match="made without added_cond_kwargs"):
        pipeline.unet(**calls | {"added_cond_kwargs": {"image_embeds": torch.zeros(1)}})


@pytest.mark.slow
def test_image_to_image_on_engines(sd_built, plan, relative):
    generator, built = sd_built
    drawn = generator.sample(["a cat"], seeds=[9], plan=plan).images[0]
    picture = torch.from_numpy(drawn).permute(2, 0, 1)[None] / 255  # [1, 3, height, width]
    engine = load(built.folder)
    encoded = generator.pipeline.vae.encode(2 * picture - 1).latent_dist.mode().detach()
    assert relative(engine.vae.encode(2 * picture - 1).latent_dist.mode(), encoded) < 1e-4
    assert relative(engine.vae.encode(1 - 2 * picture).latent_dist.mode(), encoded) > 0.1
    again = StableDiffusionImg2ImgPipeline(**engine.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    redrawn = again("a dog", image=picture, strength=0.7, num_inference_steps=4, output_type="np").images
    assert redrawn.shape == (1, *drawn.shape)
    assert redrawn.std() > 0


@pytest.mark.slow
def test_the_folder_around_an_engine_is_enough(ddpm_built):
    pipeline = load(ddpm_built[1].folder.parent)
    assert list(pipeline.providers) == ["unet"]
    assert "CPUExecutionProvider" in pipeline.providers["unet"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "lost", ["model_index.json", "diffpress.json", "unet/model.onnx", "unet/config.json", "scheduler"]
)
def test_an_incomplete_folder(ddpm_built, tmp_path, lost):
    folder = shutil.copytree(ddpm_built[1].folder, tmp_path / "copy")
    shutil.rmtree(folder / lost) if (folder / lost).is_dir() else (folder / lost).unlink()
    with pytest.raises(ArtifactError, match=rf"not a built engine.*{Path(lost).name} is missing"):
        load(folder)


@pytest.mark.slow
def test_an_input_that_the_pipeline_does_not_give(ddpm_built):
    unet = load(ddpm_built[1].folder).unet
    with pytest.raises(EngineError, match="the engine needs timestep; the pipeline gave sample"):
        unet(torch.zeros(1, 3, 8, 8))


def spoiled(ddpm, context, output, monkeypatch, replacement):
    """Export with another `Activation.export` than the one that torch's fake quantization agrees with."""
    given = context(ddpm)
    Int8(Int8Config()).apply(ddpm, given)
    monkeypatch.setattr(Activation, "export", replacement)
    return export(ddpm, output, ExportConfig(), plan=given.plan, conditions=given.conditions)


@pytest.mark.slow
def test_a_graph_that_computes_something_else(ddpm, context, monkeypatch, tmp_path):
    right = Activation.export
    with pytest.raises(ParityError, match="unet: the engine differs from torch"):
        spoiled(ddpm, context, tmp_path / "engine", monkeypatch, lambda self, x: right(self, 3 * x))


@pytest.mark.slow
def test_a_graph_without_its_quantizers(ddpm, context, monkeypatch, tmp_path):
    with pytest.raises(PrecisionError, match="layers were quantized, but only 0 products"):
        spoiled(ddpm, context, tmp_path / "engine", monkeypatch, lambda self, x: x)


def test_a_network_that_was_made_in_memory_comes_back_as_its_class(plan, tmp_path, relative):
    generator = Generator(make("qwen"))
    assert "_class_name" not in generator.denoiser.config
    plan = dataclasses.replace(plan, height=16, width=16)
    run = {"conditions": generator.conditions(2), "seeds": [0, 1], "plan": plan}
    wanted = generator.sample(**run).latents
    export(generator, tmp_path, ExportConfig(target="openvino"), plan=plan, conditions=run["conditions"])
    assert relative(Generator(load(tmp_path)).sample(**run).latents, wanted) < 1e-3


def test_what_cannot_be_built_is_refused_first(dit, monkeypatch):
    with pytest.raises(ConfigError, match="size 'dynamic', but DiTPipeline has a fixed size"):
        check_export(dit, ExportConfig(size="dynamic"))
    monkeypatch.setattr(build, "_importable", lambda package: False)
    with pytest.raises(MissingDependencyError, match=r"pip install 'diffpress\[openvino\]'"):
        check_export(dit, ExportConfig(target="openvino"))


@pytest.mark.parametrize("has", [False, True])
def test_precision_that_the_machine_decides(dit, context, tmp_path, monkeypatch, has):
    for module in (build, settings):
        monkeypatch.setattr(module, "has_bfloat16", lambda device: has)
    auto = ExportConfig(target="openvino", compute="auto")
    check_export(dit, auto)
    assert auto.precision == ("bfloat16" if has else "float32")
    assert ExportConfig(compute="auto").precision == "float32"
    if has:
        check_export(dit, dataclasses.replace(auto, compute="bfloat16"))
        return
    with pytest.raises(ConfigError, match="compute bfloat16, but CPU of this machine computes in float32; allowed"):
        check_export(dit, dataclasses.replace(auto, compute="bfloat16"))
    given = context(dit)
    export(dit, tmp_path, auto, plan=given.plan, conditions=given.conditions)
    assert json.loads((tmp_path / MANIFEST).read_text())["export"]["compute"] == "float32"


@pytest.mark.parametrize("gpu", [False, True])
def test_an_engine_for_the_cpu_stays_there(monkeypatch, gpu):
    known = ["CUDAExecutionProvider"] * gpu + ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    assert ExportConfig().decided()["providers"] == (None if gpu else ("CPUExecutionProvider",))
    for given in ({"target": "openvino"}, {"providers": ("CUDAExecutionProvider",)}):
        assert ExportConfig(**given).decided()["providers"] == given.get("providers")


def test_shapes_that_a_tensorrt_engine_takes():
    free = {0: "batch", 1: "text", 2: "size"}
    assert build._profile((4, 10, 8, 3), free, 32) == ((1, 1, 4, 3), (4, 10, 8, 3), (64, build.LONGEST_TEXT, 32, 3))
    assert build._profile((2, 2000), free, 5) == ((1, 1), (2, 2000), (5, 8000))


def test_kept_texts_of_any_length_are_refused_for_tensorrt(tmp_path):
    generator = Generator(make("cogview4"))
    parts = find_components(generator, generator.conditions(2), SamplingPlan(steps=2), batch=None, any_size=False)
    part = next(part for part in parts if part.role == "denoiser")
    shapes = {name: tuple(tensor.shape) for name, tensor in part.flat_inputs().items()} | {"start.1": (4, 23, 64)}
    with pytest.raises(ConfigError, match="feature cache on target tensorrt, but texts of transformer are of any"):
        build._build_tensorrt(tmp_path / "model.onnx", shapes, part, tmp_path, ExportConfig(target="tensorrt"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_in_another_precision_are_refused_first(ddpm, context, dtype):
    ddpm.pipeline.unet.conv_in.to(getattr(torch, dtype))
    with pytest.raises(ConfigError, match=f"unet has weights in {dtype}; allowed: float32"):
        check_export(ddpm, ExportConfig())
    ddpm.pipeline.unet.conv_in.float()
    Int8(Int8Config()).apply(ddpm, context(ddpm))
    check_export(ddpm, ExportConfig())


def test_timesteps_that_follow_the_size_are_refused_first():
    generator, settings = Generator(make("flux")), ExportConfig(size="dynamic", timesteps="plan")
    check_export(generator, settings)
    generator.pipeline.scheduler.register_to_config(use_dynamic_shifting=True)
    with pytest.raises(ConfigError, match=r"follow the size .* allowed: size static, or timesteps any"):
        check_export(generator, settings)
    for other in (ExportConfig(size="dynamic"), ExportConfig(timesteps="plan")):
        check_export(generator, other)
    generator.plan = SamplingPlan(steps=2, timesteps=(999, 300))
    check_export(generator, settings)


def test_networks_that_cannot_be_traced_are_refused_first():
    """The list is of names; that these have to be on it, torch says."""
    chroma = Generator(make("chroma"))
    with pytest.raises(ConfigError, match="ChromaTransformer2DModel makes a constant of it; allowed: a number"):
        check_export(chroma, ExportConfig())
    check_export(chroma, ExportConfig(batch=2))
    pipeline = make("qwen")
    pipeline.transformer.register_to_config(use_layer3d_rope=True)
    with pytest.raises(ConfigError, match="QwenImageTransformer2DModel with use_layer3d_rope computes with the shapes"):
        check_export(Generator(pipeline), ExportConfig())


class Qwen(torch.nn.Module):
    """Qwen-Image's stock transformer on four pictures of 4 x 4 patches."""

    def __init__(self):
        super().__init__()
        self.network = make("qwen").transformer

    def forward(self, *tensors):
        x, text, timestep = tensors
        return self.network(x, text, timestep=timestep, img_shapes=[[(1, 4, 4)]] * 4, return_dict=False)[0]


@pytest.mark.slow
def test_torch_cannot_trace_what_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "FIXED_BATCH", ())
    plan = SamplingPlan(steps=1, guidance_scale=1.0, height=16, width=16)
    with pytest.raises(EngineError, match=r"transformer: torch.onnx cannot export it: .*a fixed batch"):
        export(Generator(make("chroma")), tmp_path, ExportConfig(), plan=plan, conditions=["a cat", "a dog"])
    inputs = {"x": torch.randn(4, 16, 16), "text": torch.randn(4, 7, 16), "timestep": torch.rand(4)}
    free = {"text": {1: "text"}}
    with pytest.raises(EngineError, match="cannot export it"):
        export_graph(Qwen().eval(), inputs, ["out"], tmp_path / "qwen" / "model.onnx", free=free, opset=20)
