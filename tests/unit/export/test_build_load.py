"""From a quantized pipeline to a folder, and back to a pipeline that draws the same pictures."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import openvino
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from families import lumina2, make

from diffpress import targets
from diffpress.errors import (
    ArtifactError,
    ConfigError,
    EngineError,
    MissingDependencyError,
    ParityError,
    PrecisionError,
)
from diffpress.export import build
from diffpress.export.build import check_export, export
from diffpress.export.components import Flat, find_components, flatten_inputs
from diffpress.export.graph import export_graph
from diffpress.export.load import load
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


def test_what_cannot_be_built_is_refused_first(dit, monkeypatch):
    with pytest.raises(ConfigError, match="size 'dynamic', but DiTPipeline has a fixed size"):
        check_export(dit, ExportConfig(size="dynamic"))
    monkeypatch.setattr(build, "_importable", lambda package: False)
    with pytest.raises(MissingDependencyError, match=r"pip install 'diffpress\[openvino\]'"):
        check_export(dit, ExportConfig(target="openvino"))


def test_networks_that_cannot_be_traced_are_refused_first():
    """The list is of names; that these have to be on it, torch says."""
    chroma = Generator(make("chroma"))
    with pytest.raises(ConfigError, match="ChromaTransformer2DModel makes a constant of it; allowed: a number"):
        check_export(chroma, ExportConfig())
    check_export(chroma, ExportConfig(batch=2))
    with pytest.raises(ConfigError, match="Lumina2Transformer2DModel computes with lengths of texts in Python"):
        check_export(Generator(lumina2()), ExportConfig())


@pytest.mark.slow
@pytest.mark.parametrize(("make_one", "error"), [(partial(make, "chroma"), "a fixed batch"), (lumina2, "SymInt")])
def test_torch_cannot_trace_what_is_refused(make_one, error, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "UNTRACEABLE", ())
    monkeypatch.setattr(build, "FIXED_BATCH", ())
    plan = SamplingPlan(steps=1, guidance_scale=1.0, height=16, width=16)
    with pytest.raises(EngineError, match=f"transformer: torch.onnx cannot export it: .*{error}"):
        export(Generator(make_one()), tmp_path, ExportConfig(), plan=plan, conditions=["a cat", "a dog"])


@pytest.mark.parametrize(
    ("target", "good", "bad", "has"),
    [
        ("onnxruntime", "CPUExecutionProvider", "NoSuchProvider", "CPUExecutionProvider"),
        ("openvino", "AUTO:CPU", "NPU7", "CPU"),
        ("openvino", "HETERO:CPU", "HETERO:NPU7,CPU", "CPU"),
    ],
)
def test_a_provider_that_is_not_on_this_machine_is_refused_first(dit, target, good, bad, has):
    check_export(dit, ExportConfig(target=target, providers=(good,)))
    with pytest.raises(ConfigError, match=rf"providers {bad}: not available to {target} .* which has .*{has}"):
        check_export(dit, ExportConfig(target=target, providers=(bad,)))


@pytest.mark.parametrize("device", ["CPU", "AUTO"])
def test_bfloat16_that_the_machine_lacks_is_refused_first(dit, monkeypatch, device):
    settings = ExportConfig(target="openvino", compute="bfloat16", providers=(device,))
    for able in (["FP32", "BF16"], ["FP32"]):
        core = SimpleNamespace(available_devices=["CPU"], get_property=lambda *_, able=able: able)
        monkeypatch.setattr(openvino, "Core", lambda core=core: core)
        if "BF16" in able:
            check_export(dit, settings)
    with pytest.raises(ConfigError, match=f"compute bfloat16, but {device} of this machine .*; allowed here: float32"):
        check_export(dit, settings)


def test_8_bits_that_would_overflow_here_are_refused_first(dit, monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(targets, "has_dot_products", lambda has=has: has)
        for chosen in (None, False, *([True] if has else [])):
            check_export(dit, ExportConfig(dot_products=chosen))
        check_export(dit, ExportConfig(target="openvino", dot_products=True))
    with pytest.raises(ConfigError, match=r"dot_products true, but this CPU has none.*; true for openvino"):
        check_export(dit, ExportConfig(dot_products=True))
    with pytest.raises(ValueError, match="dot_products is for targets onnxruntime and openvino; target is tensorrt"):
        ExportConfig(target="tensorrt", dot_products=True)


def test_a_target_that_takes_one_device_refuses_two():
    assert ExportConfig(providers=("CUDAExecutionProvider", "CPUExecutionProvider")).providers
    with pytest.raises(ValueError, match=r"providers \['GPU', 'CPU'\]: target openvino takes one device"):
        ExportConfig(target="openvino", providers=("GPU", "CPU"))


def test_a_folder_that_is_no_engine(tmp_path):
    with pytest.raises(ArtifactError, match=r"is not a built engine.*diffpress\.json is missing"):
        load(tmp_path)
    (tmp_path / "diffpress.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load(tmp_path)


def distilled(folder, tmp_path):
    """A copy of an engine folder whose manifest says that it was distilled for 2 steps without guidance."""
    copy = shutil.copytree(folder, tmp_path / "distilled")
    manifest = json.loads((copy / build.MANIFEST).read_text())
    manifest |= {"distilled": True, "plan": manifest["plan"] | {"steps": 2, "guidance_scale": 1.0}}
    (copy / build.MANIFEST).write_text(json.dumps(manifest))
    return copy


def warnings_in(caplog):
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("has", [False, True])
def test_an_engine_of_a_cpu_that_can_more_is_warned_of(dit_built, tmp_path, caplog, monkeypatch, has):
    folder = shutil.copytree(dit_built[1].folder, tmp_path / "engine")
    manifest = json.loads((folder / build.MANIFEST).read_text())
    assert manifest["largest_code"] == find_target("onnxruntime").weight_limit()
    (folder / build.MANIFEST).write_text(json.dumps(manifest | {"largest_code": 127}))
    monkeypatch.setattr(targets, "has_dot_products", lambda: has)
    load(folder)
    assert any("sums can overflow" in text for text in warnings_in(caplog)) == (not has)


@pytest.mark.slow
def test_an_engine_for_a_cpu_that_can_more_is_exact_here(
    ddpm_folder, context, plan, relative, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(targets, "has_dot_products", lambda: False)
    built = build_int8(ddpm_folder, tmp_path / "engine", context, "openvino", dot_products=True)
    assert built[1].quantized_layers > built[1].quantized_ops == 0
    assert "8 bits simulated" in built[1].provider
    assert json.loads((built[1].folder / build.MANIFEST).read_text())["largest_code"] == 127
    assert_same_pictures(built, ddpm_folder, plan, relative)
    assert any("it computes in float32 here, slower" in text for text in warnings_in(caplog))


def test_a_distilled_engine_is_sampled_as_it_was_distilled(dit_built, tmp_path, caplog):
    pipeline = load(distilled(dit_built[1].folder, tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args), with_kwargs=True)
    assert type(pipeline).__name__ == "DiTPipeline"
    assert Generator(pipeline).plan_for(Generator(pipeline).plan).steps == 2
    one = pipeline([1], generator=torch.Generator().manual_seed(0), output_type="np").images
    assert (len(seen), warnings_in(caplog)) == (2, [])
    pipeline([1], num_inference_steps=2, guidance_scale=1.0, output_type="np")
    assert (len(seen), warnings_in(caplog)) == (4, [])
    with caplog.at_level("WARNING"):
        other = pipeline(
            [1], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
    assert warnings_in(caplog) == ["made for num_inference_steps=2, called with 3: expect worse pictures"]
    assert len(seen) == 7
    assert abs(one - other).max() > 0.01


def test_an_engine_with_a_grid_is_sampled_on_it(dit_built, tmp_path, caplog, relative):
    """For as many steps, whoever asks; other steps and timesteps of a call are its own, and a warning says so."""
    folder = shutil.copytree(dit_built[1].folder, tmp_path / "gridded")
    manifest = json.loads((folder / build.MANIFEST).read_text())
    made = SamplingPlan(steps=3, guidance_scale=2.0, timesteps=(999, 500, 60))
    manifest |= {"distilled": True, "plan": json.loads(json.dumps(dataclasses.asdict(made)))}
    (folder / build.MANIFEST).write_text(json.dumps(manifest))
    engine = Generator(load(folder))
    assert engine.plan == made

    def run(**settings):
        given = {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
        images = engine.pipeline([1], **given, **settings).images
        return images, engine.pipeline.scheduler.timesteps.tolist(), engine.pipeline.scheduler.sigmas

    with caplog.at_level("WARNING"):
        images, timesteps, sigmas = run()
        assert (timesteps, warnings_in(caplog)) == ([999, 500, 60], [])
        assert sigmas[-1] == 0
        assert run(num_inference_steps=3)[1] == [999, 500, 60]
        assert run(num_inference_steps=2)[1] == [999, 499]
    assert warnings_in(caplog) == ["made for num_inference_steps=3, called with 2: expect worse pictures"]
    assert "set_timesteps" not in vars(engine.pipeline.scheduler)
    drawn = engine.sample([1], seeds=[0], plan=engine.plan_for(SamplingPlan())).images[0]
    assert abs(drawn - images[0] * 255).max() <= 1
    other = dataclasses.replace(made, timesteps=(999, 300, 60))  # as asked for, not as the engine has it
    assert abs(engine.sample([1], seeds=[0], plan=other).images[0] - images[0] * 255).max() > 1
    assert engine.pipeline.scheduler.timesteps.tolist() == [999, 300, 60]


def test_an_engine_that_was_not_distilled_has_no_plan_of_its_own(dit_built, caplog):
    pipeline = load(dit_built[1].folder)
    pipeline.set_progress_bar_config(disable=True)
    with caplog.at_level("WARNING"):
        pipeline([1], num_inference_steps=3, output_type="np")
    assert Generator(pipeline).plan is None
    assert warnings_in(caplog) == []
