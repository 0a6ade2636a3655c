"""The parts of a pipeline, their names and their free axes, found by running it."""

import pytest
import torch
from families import make

from diffpress.errors import ConfigError, EngineError
from diffpress.export.components import Component, Flat, find_components, flatten_inputs, in_turn, with_masks
from diffpress.export.graph import export_graph
from diffpress.export.session import OnnxRuntimeSession
from diffpress.generator import Generator, SamplingPlan

BATCH, SIZE = {0: "batch"}, {2: "size", 3: "size"}
AUTOENCODER = {
    "vae_decoder": ("decoder", {"latent_sample": BATCH}, ["sample"]),
    "vae_encoder": ("encoder", {"sample": BATCH}, ["latent_parameters"]),
}


def described(components):
    return {part.folder: (part.role, part.free, list(part.outputs)) for part in components}


def test_class_conditional(dit, plan):
    components = find_components(dit, [0, 1], plan, batch=None, any_size=False)
    inputs = {"hidden_states": BATCH, "timestep": BATCH, "class_labels": BATCH}
    assert described(components) == {"transformer": ("denoiser", inputs, ["out_sample"]), **AUTOENCODER}
    assert {part.folder: part.attribute for part in components}["vae_encoder"] == "vae"


def test_text_to_image_of_any_size(sd, plan):
    components = find_components(sd, ["a cat", "a dog"], plan, batch=None, any_size=True)
    inputs = {"sample": BATCH | SIZE, "timestep": {}, "encoder_hidden_states": BATCH}
    found = described(components)
    assert found["unet"] == ("denoiser", inputs, ["out_sample"])
    assert found["text_encoder"][:2] == ("text", {"input_ids": BATCH})
    assert found["text_encoder"][2][:2] == ["last_hidden_state", "pooler_output"]
    assert found["vae_decoder"][1] == {"latent_sample": BATCH | SIZE}
    assert found["vae_encoder"][1] == {"sample": BATCH | SIZE}


def test_a_call_at_another_size_is_kept_where_the_size_is_free(sd, plan):
    parts = find_components(sd, ["a cat", "a dog"], plan, batch=None, any_size=True)
    assert {part.folder for part in parts if part.resized} == {"unet", "vae_decoder", "vae_encoder"}
    for part in parts:
        if part.resized is None:
            continue
        inputs, outputs = part.resized
        shapes = [next(iter(tensors.values())).shape for tensors in (part.flat_inputs(), inputs)]
        assert shapes[1][2:] != shapes[0][2:]
        assert shapes[1][2] != shapes[1][3]  # height and width are told apart
        flat = Flat(getattr(sd.pipeline, part.attribute), part)
        with torch.no_grad():
            torch.testing.assert_close(dict(zip(outputs, flat(*inputs.values()), strict=True)), outputs)
    assert not any(part.resized for part in find_components(sd, ["a cat"], plan, batch=None, any_size=False))


def test_unconditional_in_pixels(ddpm, plan):
    components = find_components(ddpm, [None], plan, batch=None, any_size=False)
    assert described(components) == {"unet": ("denoiser", {"sample": BATCH, "timestep": {}}, ["out_sample"])}


def test_a_fixed_batch_leaves_nothing_free(dit, plan):
    components = find_components(dit, [0], plan, batch=3, any_size=False)
    assert not any(axes for part in components for axes in part.free.values())
    batches = {part.folder: len(next(iter(part.flat_inputs().values()))) for part in components}
    assert batches == {"transformer": 6, "vae_decoder": 3, "vae_encoder": 3}  # guidance doubles the denoiser's


def test_text_encoders_take_any_number_of_prompts(sd, plan):
    parts = {part.folder: part for part in find_components(sd, ["a cat"], plan, batch=2, any_size=False)}
    assert parts.pop("text_encoder").free == {"input_ids": BATCH}
    assert not any(axes for part in parts.values() for axes in part.free.values())
    alone = find_components(sd, ["a cat"], plan, batch=1, any_size=False)
    assert not any(axes for part in alone for axes in part.free.values())


def test_conditions_in_turn(sd, plan):
    assert in_turn(["a", "b"], 3) == ["a", "b", "a"]
    with pytest.raises(ConfigError, match="list of conditions is empty; allowed: one and more"):
        find_components(sd, [], plan, batch=None, any_size=False)


def test_another_size_where_there_is_one_only(dit, plan):
    with pytest.raises(EngineError, match="DiTPipeline has a fixed size"):
        find_components(dit, [0], plan, batch=1, any_size=True)


def test_a_part_that_is_never_called_is_named(sd, plan, monkeypatch):
    embeds = torch.zeros(2, 12, 16)
    monkeypatch.setattr(type(sd.pipeline), "encode_prompt", lambda *_, **__: (embeds, embeds))
    with pytest.raises(EngineError, match="text_encoder: not called"):
        find_components(sd, ["a cat"], plan, batch=2, any_size=False)


def test_flat_modules_compute_what_was_recorded(any_generator, plan):
    """Text encoder, denoiser, decoder and encoder, as functions of tensors alone."""
    for part in find_components(any_generator, any_generator.conditions(2), plan, batch=2, any_size=False):
        flat, inputs = Flat(getattr(any_generator.pipeline, part.attribute), part), part.flat_inputs()
        with torch.no_grad():
            outputs = flat(*inputs.values())
            torch.testing.assert_close(dict(zip(part.outputs, outputs, strict=True)), part.outputs)
            others = flat(*(value.flip(0) if value.ndim else value for value in inputs.values()))
        assert not torch.allclose(others[0], outputs[0]), part.folder


def test_recording_leaves_nothing_behind(sd, plan):
    find_components(sd, ["a cat"], plan, batch=2, any_size=False)
    assert not {"forward", "decode"} & (vars(sd.denoiser).keys() | vars(sd.pipeline.vae).keys())
    assert "forward" not in vars(sd.pipeline.text_encoder)


def test_names_of_nested_inputs():
    a, b, c, d = (torch.full((1,), value) for value in (1, 2, 3, 4))
    nested = {"sample": a, "added_cond_kwargs": {"text_embeds": b}, "residuals": [c, d], "timestep": a, "scale": 3.0}
    flat = flatten_inputs(nested)
    assert list(flat) == ["sample", "text_embeds", "residuals.0", "residuals.1", "timestep"]
    assert flat["residuals.1"] is d
    assert (flat["sample"].dtype, flat["timestep"].dtype) == (torch.int64, torch.float32)


TEXT = {0: "batch", 1: "text"}


def test_texts_of_any_length():
    """Where prompts are not padded to one length, what follows it is free, and equal lengths stay equal."""
    plan = SamplingPlan(steps=2, guidance_scale=3.0, height=16, width=16)
    generator = Generator(make("cogview4"))
    prompts = ["a cat in a tree", "a dog"]
    parts = {part.folder: part for part in find_components(generator, prompts, plan, batch=None, any_size=False)}
    assert parts["text_encoder"].free == {"input_ids": TEXT}
    denoiser = parts["transformer"].free
    assert denoiser.pop("encoder_hidden_states") == TEXT
    assert all(axes == BATCH for axes in denoiser.values())
    assert parts["transformer"].outputs["out_sample"].shape[0] == 2


def test_texts_that_are_longer_than_their_negative():
    """Sana puts instructions before a prompt, and none before the negative one."""
    plan = SamplingPlan(steps=2, guidance_scale=3.0, height=32, width=32)
    parts = find_components(Generator(make("sana")), ["a cat", "a dog"], plan, batch=None, any_size=False)
    found = {part.folder: part for part in parts}
    assert found["text_encoder"].free == {"input_ids": TEXT, "attention_mask": TEXT}
    assert found["transformer"].free["encoder_hidden_states"] == BATCH
    assert list(found["vae_encoder"].outputs) == ["latent"]  # there is no distribution


def test_equal_lengths_are_told_to_the_exporter():
    class Told(torch.nn.Module):
        def forward(self, text, mask, return_dict):
            return (text * mask,)

    text = torch.rand(2, 5)
    free = {"text": TEXT, "mask": TEXT}
    part = Component("denoiser", "", "", "forward", {"text": text, "mask": text}, {}, {"out_sample": text}, free, None)
    flat = Flat(Told(), part)
    torch.testing.assert_close(flat(text[:, :3], text[:, :3])[0], text[:, :3] ** 2)
    with pytest.raises(RuntimeError):
        flat(text, text[:1])  # would broadcast


def test_a_mask_that_is_not_given_hides_nothing():
    text = torch.rand(2, 5, 3)
    given = with_masks({"text": text, "other": text}, ["text_mask", "text", "elsewhere_mask"])
    assert list(given) == ["text_mask", "text", "other"]
    assert given["text_mask"].shape == (2, 5)
    assert given["text_mask"].all()
    assert with_masks({"text": text, "text_mask": text}, ["text_mask"])["text_mask"] is text


class Divided(torch.nn.Module):
    """Where x is not positive, zero over next to nothing."""

    def forward(self, x, return_dict=True):
        return (x.relu() / (x.relu() + 1e-15),)


def test_an_epsilon_outlives_the_exporter(tmp_path):
    x = torch.linspace(-1, 1, 6)[None]
    part = Component("denoiser", "", "", "forward", {"x": x}, {}, {"out_sample": x}, {"x": {}}, None)
    exact = Divided()(x)[0]

    class Bare(torch.nn.Module):
        def forward(self, *tensors):
            return Divided()(tensors[0])[0]

    found = []
    for name, module in (("flat", Flat(Divided(), part)), ("bare", Bare())):
        path = tmp_path / name / "model.onnx"
        export_graph(module.eval(), {"x": x}, ["out_sample"], path, free={"x": {}}, opset=20)
        found.append(OnnxRuntimeSession(path)({"x": x})[0])
    torch.testing.assert_close(found[0], exact, rtol=1e-4, atol=1e-6)
    assert found[1].isnan().any()  # control: alone it is taken for zero
