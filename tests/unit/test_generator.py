"""One way to load, condition, sample and watch, whatever the family."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from families import make, zimage
from tiny import make_scheduler
from torch import nn
from torch.utils._pytree import tree_leaves

from diffpress.denoise import encode, trajectory
from diffpress.errors import CheckpointError, ConfigError
from diffpress.generator import Generator, SamplingPlan, patched


def rewrite_index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def broken(dit_folder, tmp_path):
    """A copy of the tiny DiT, to be damaged."""
    return shutil.copytree(dit_folder, tmp_path / "copy")


def test_load_names_a_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        Generator.load(tmp_path / "nowhere")


def test_load_refuses_weights_that_are_cut_off(broken):
    path = broken / "transformer/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut off or corrupt"):
        Generator.load(broken)


def test_load_refuses_an_unknown_pipeline_class(broken):
    rewrite_index(broken, _class_name="NoSuchPipeline")
    with pytest.raises(CheckpointError, match=r"diffusers cannot load it.*NoSuchPipeline"):
        Generator.load(broken)


def test_load_refuses_weights_that_do_not_fit_their_config(broken):
    path = broken / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 3}))
    with pytest.raises(CheckpointError, match="diffusers cannot load it") as caught:
        Generator.load(broken)
    assert len(str(caught.value).splitlines()) <= 5
    assert "more lines" in str(caught.value)


def test_load_takes_the_variant_that_is_named(broken):
    """In halves, and in parts that have no such weights the plain ones."""
    plain = Generator.load(broken)
    weight = next(iter(plain.denoiser.state_dict()))
    plain.denoiser.half().save_pretrained(broken / "transformer", variant="fp16")
    halved = Generator.load(broken, variant="fp16").denoiser.state_dict()[weight]
    whole = Generator.load(broken).denoiser.state_dict()[weight]
    assert torch.equal(halved, whole.half().float())
    assert not torch.equal(halved, whole)
    (broken / "transformer/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="variant fp16 alone"):
        Generator.load(broken)


def test_load_takes_no_weights_for_lost_ones(broken):
    (broken / "transformer/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        Generator.load(broken)


def test_a_pipeline_without_denoiser_names_its_parts(dit):
    class Autoencoding(DiffusionPipeline):
        def __init__(self, vae):
            super().__init__()
            self.register_modules(vae=vae)

    with pytest.raises(CheckpointError, match=r"Autoencoding has no 'transformer' or 'unet'; its parts are vae"):
        Generator(Autoencoding(dit.pipeline.vae))


def test_a_pipeline_that_is_conditioned_in_no_known_way(dit):
    class Sounding(DiffusionPipeline):
        def __init__(self, unet):
            super().__init__()
            self.register_modules(unet=unet)

        def __call__(self, melody):
            """Take something that is neither class nor text."""

    with pytest.raises(CheckpointError, match=r"called with \(self, melody\)"):
        Generator(Sounding(dit.denoiser))


def test_kinds_and_sizes(dit, sd, ddpm):
    assert [g.conditioning_kind for g in (dit, sd, ddpm)] == ["class", "text", "unconditional"]
    assert [g.denoiser_name for g in (dit, sd, ddpm)] == ["transformer", "unet", "unet"]
    assert [g.can_resize for g in (dit, sd, ddpm)] == [False, True, False]
    assert [g.default_size for g in (dit, sd, ddpm)] == [(16, 16), (16, 16), (8, 8)]


def test_a_pipeline_that_knows_its_size_is_believed(sd):
    sd.pipeline.default_sample_size = 128  # as Flux has it: its transformer has no size of its own
    assert sd.default_size == (256, 256)
    del sd.pipeline.default_sample_size
    sd.pipeline.unet.register_to_config(sample_size=None)
    with pytest.raises(CheckpointError, match="give height and width"):
        sd.default_size  # noqa: B018 - a property that raises


def test_pictures_depend_on_their_seed_and_not_on_the_batch(any_generator, plan):
    generator, seeds = any_generator, [3, 1, 4, 1]
    conditions = generator.conditions(4)
    whole = generator.sample(conditions, seeds=seeds, plan=plan, batch_size=4)
    single = generator.sample(conditions, seeds=seeds, plan=plan, batch_size=1)
    other = generator.sample(conditions, seeds=[8, 7, 6, 5], plan=plan)
    height, width = generator.default_size
    assert whole.images.shape == (4, height, width, 3)
    assert whole.images.dtype == np.uint8
    assert np.abs(whole.images.astype(int) - single.images).max() <= 1
    assert np.abs(whole.images.astype(int) - other.images).max() > 10  # another seed is another picture
    if whole.latents is None:
        assert generator.conditioning_kind == "unconditional"
    else:
        np.testing.assert_allclose(whole.latents, single.latents, rtol=1e-3, atol=1e-4)
        assert np.abs(whole.latents - other.latents).max() > 0.1


def test_latents_are_what_the_stock_pipeline_decodes(sd, plan):
    samples = sd.sample(["a cat"], seeds=[5], plan=plan)
    stock = sd.pipeline(
        "a cat",
        num_inference_steps=plan.steps,
        guidance_scale=plan.guidance_scale,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images
    np.testing.assert_allclose(samples.latents, stock / sd.pipeline.vae.config.scaling_factor, rtol=1e-5)


def test_the_scheduler_of_a_plan_is_that_of_its_run_alone(sd, plan):
    run = {"conditions": ["a cat"], "seeds": [0]}
    own, kind = sd.sample(**run, plan=plan).latents, type(sd.pipeline.scheduler)
    other = replace(plan, scheduler="DDIMScheduler")
    assert not np.array_equal(sd.sample(**run, plan=other).latents, own)
    assert type(sd.pipeline.scheduler) is kind
    trajectory(sd, ["a cat"], seeds=[0], plan=other)
    assert type(sd.pipeline.scheduler) is kind
    assert np.array_equal(sd.sample(**run, plan=plan).latents, own)


@pytest.mark.parametrize(
    ("family", "size", "match"), [("sd3", 17, "refuses it: .*divisible"), ("flux", 18, "draws 16 x 16")]
)
def test_sizes_that_a_pipeline_does_not_draw(family, size, match):
    plan = SamplingPlan(steps=1, height=size, width=size)
    with pytest.raises(ConfigError, match=f"{size} x {size} pixels: .*{match}"):
        Generator(make(family)).sample(["x"], seeds=[0], plan=plan)


def test_one_seed_for_each_condition(dit, plan):
    with pytest.raises(ConfigError, match="2 conditions but 1 seeds"):
        dit.sample([0, 1], seeds=[0], plan=plan)


def test_conditions_cycle(dit, sd, ddpm):
    assert dit.conditions(6) == [0, 1, 2, 3, 0, 1]
    assert dit.conditions(3, ["owl", 7]) == [2, 7, 2]
    assert dit.conditions(3, ["owl", "7"]) == [2, 7, 2]  # a line of a file
    assert sd.conditions(3, ["a", "b"]) == ["a", "b", "a"]
    assert all(isinstance(prompt, str) and prompt for prompt in sd.conditions(100))
    assert ddpm.conditions(2) == [None, None]


@pytest.mark.parametrize("wrong", [1000, -1, 1.0, True, None, "1000"])
def test_classes_that_do_not_exist(dit, wrong):
    with pytest.raises(ConfigError, match=r"is not a name or a number from 0 to 999"):
        dit.conditions(1, [wrong])


def test_unknown_class_name_lists_the_known(dit):
    with pytest.raises(ConfigError, match=r"'cow' is not one of cat, dog, fox, owl"):
        dit.conditions(1, ["cow"])


@pytest.mark.parametrize("wrong", [3, None, ["a cat"], b"a cat"])
def test_prompts_that_are_not_text(sd, wrong):
    with pytest.raises(ConfigError, match="allowed: text"):
        sd.conditions(2, ["a cat", wrong])


def test_no_conditions(sd):
    with pytest.raises(ConfigError, match="is empty"):
        sd.conditions(2, [])
    with pytest.raises(ConfigError, match="count of conditions is 0"):
        sd.conditions(0)


def test_conditional_half_of_a_class_batch_is_the_first(dit, plan):
    conditional, unconditional = encode(dit, [2, 3], plan)
    assert conditional.tensors["class_labels"].tolist() == [2, 3]
    assert unconditional.tensors["class_labels"].tolist() == [1000, 1000]


def test_conditional_half_of_a_text_batch_is_the_second(sd, plan):
    conditional, unconditional = encode(sd, ["a cat", "an owl"], plan)
    embed = sd.pipeline.encode_prompt(["a cat", "an owl"], "cpu", 1, True)
    torch.testing.assert_close(conditional.tensors["encoder_hidden_states"], embed[0])
    torch.testing.assert_close(unconditional.tensors["encoder_hidden_states"], embed[1])
    assert not torch.equal(embed[0], embed[1])


def test_no_guidance_no_second_half(ddpm, plan):
    conditional, unconditional = encode(ddpm, [None], plan)
    assert conditional.tensors == {}
    assert unconditional is None


def two_calls(prompts):
    """What CogView4 is given for its two branches, and the two calls of a guided run."""
    generator = Generator(make("cogview4"))
    plan = SamplingPlan(steps=2, guidance_scale=3.0, height=16, width=16)
    return *encode(generator, prompts, plan), generator.record(prompts, seeds=[0], plan=plan)


def test_branches_of_two_calls():
    alone, without, calls = two_calls(["a cat"])
    assert len(calls) == 4
    for branch, call in ((alone, calls[0]), (without, calls[1])):
        torch.testing.assert_close(branch.tensors["encoder_hidden_states"], call.inputs["encoder_hidden_states"])
    assert not torch.equal(alone.tensors["encoder_hidden_states"], without.tensors["encoder_hidden_states"])


def test_branches_of_two_calls_have_texts_of_their_own_length():
    alone, without, _ = two_calls(["a cat in a tree that looks down at a dog"])
    assert alone.tensors["encoder_hidden_states"].shape[1] > without.tensors["encoder_hidden_states"].shape[1]


@pytest.mark.parametrize("family", ["flux", "hunyuan"])
def test_tensors_that_a_batch_shares_are_told_from_as_many_conditions(family):
    """Position ids and rotations, with a token for each row of the other inputs, of one branch or of both."""
    generator = Generator(make(family))
    plan = SamplingPlan(steps=2, guidance_scale=3.0, height=64, width=64)
    one, _ = encode(generator, ["a cat"], plan)
    ids = {name: leaves for name, value in one.constants.items() if (leaves := tensors_of(value))}
    assert ids
    tokens = max(len(leaf) for leaves in ids.values() for leaf in leaves)
    for count in {tokens // 2, tokens}:
        for branch in encode(generator, [f"{number} cats" for number in range(count)], plan):
            if branch is None:  # flux is told its guidance
                continue
            torch.testing.assert_close({name: tensors_of(branch.constants[name]) for name in ids}, ids)
            assert {len(leaf) for leaf in tensors_of(branch.tensors)} == {count}
            some = branch.rows(torch.tensor([count - 1, 0]))
            assert {len(leaf) for leaf in tensors_of(some.tensors)} == {2}
            assert some.constants is branch.constants


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def test_states_of_a_run_whose_branches_are_two_calls():
    generator = Generator(make("cogview4"))
    plan = SamplingPlan(steps=3, guidance_scale=3.0, height=16, width=16)
    path = trajectory(generator, ["a cat"], seeds=[0], plan=plan)
    assert (len(path.states), len(path.timesteps)) == (4, 3)
    calls = generator.record(["a cat"], seeds=[0], plan=plan)
    torch.testing.assert_close(path.states[:-1], torch.stack([call.inputs["hidden_states"] for call in calls[::2]]))


def test_a_network_that_takes_lists_is_refused():
    pipeline = zimage()
    pipeline.transformer.__class__ = type("Other", (type(pipeline.transformer),), {})  # of a class that nobody knows
    with pytest.raises(CheckpointError, match=r"Other takes x as list.* allowed: networks"):
        Generator(pipeline)


def test_record_keeps_copies_of_every_call(any_generator, plan, first_call):
    calls = any_generator.record(any_generator.conditions(2), seeds=[0, 1], plan=plan)
    assert len(calls) == plan.steps
    for call in calls:  # a call replayed gives what was recorded: inputs were not overwritten meanwhile
        torch.testing.assert_close(first_call(any_generator, call)[0], call.output)
    times = [float(torch.as_tensor((call.inputs | call.constants)["timestep"]).flatten()[0]) for call in calls]
    assert times == sorted(times, reverse=True)


def test_record_stops_at_the_limit(dit, plan):
    assert len(dit.record([0], seeds=[0], plan=plan, limit=2)) == 2


def test_nothing_is_left_behind(any_generator, plan, hooks_of):
    generator, seen = any_generator, []
    vae = getattr(generator.pipeline, "vae", None)
    conditions = generator.conditions(1)
    generator.record(conditions, seeds=[0], plan=plan, limit=1)
    with pytest.raises(ZeroDivisionError), generator.watch(lambda call: 1 // 0):
        generator.sample(conditions, seeds=[0], plan=plan)
    assert hooks_of(generator.denoiser) == 0
    assert vae is None or "decode" not in vars(vae)
    with generator.watch(seen.append):
        assert hooks_of(generator.denoiser) == 1
        generator.sample(conditions, seeds=[0], plan=plan)
    generator.sample(conditions, seeds=[0], plan=plan)
    assert len(seen) == plan.steps
    assert hooks_of(generator.denoiser) == 0


def test_patches_nest_and_end_with_an_exception():
    module = nn.Identity()
    with patched(module, "forward", lambda x: x + 1):
        with suppress(KeyError), patched(module, "forward", lambda x: x + 10):
            assert module(0) == 10
            raise KeyError
        assert module(0) == 1
    assert module(0) == 0
    assert "forward" not in vars(module)


def test_scheduler_is_replaced_by_name(dit, plan):
    before = dit.sample([0], seeds=[0], plan=plan).images
    dit.use_scheduler("EulerDiscreteScheduler")
    assert type(dit.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert dit.pipeline.scheduler.config.prediction_type == "v_prediction"
    assert not np.array_equal(dit.sample([0], seeds=[0], plan=plan).images, before)


def test_switched_scheduler_clips_only_where_the_config_says_so(dit, ddpm):
    dit.use_scheduler("DDIMScheduler")
    ddpm.use_scheduler("DDIMScheduler")
    assert not dit.pipeline.scheduler.config.clip_sample
    assert ddpm.pipeline.scheduler.config.clip_sample  # DDPMScheduler's config says it, and pixels end at 1
    stock = DDIMScheduler.from_config(make_scheduler().config)
    assert stock.config.clip_sample  # what would be without


@pytest.mark.parametrize("name", ["NoSuchScheduler", "AutoencoderKL", "logging"])
def test_unknown_scheduler_lists_the_usable(dit, name):
    with pytest.raises(ConfigError, match=rf"{name}.*DDIMScheduler"):
        dit.use_scheduler(name)


def test_size_where_it_can_be_chosen(sd):
    images = sd.sample(["a cat"], seeds=[0], plan=SamplingPlan(steps=1, height=24, width=32)).images
    assert images.shape == (1, 24, 32, 3)


def test_size_where_it_is_fixed(dit):
    with pytest.raises(ConfigError, match=r"height is 32, but DiTPipeline has a fixed size"):
        dit.sample([0], seeds=[0], plan=SamplingPlan(steps=1, height=32, width=32))


def test_saved_and_loaded_it_is_the_same(any_generator, plan, tmp_path):
    any_generator.save(tmp_path / "again")
    again = Generator.load(tmp_path / "again")
    conditions = any_generator.conditions(1)
    first, second = (g.sample(conditions, seeds=[0], plan=plan).images for g in (any_generator, again))
    assert np.array_equal(first, second)
    assert getattr(again.pipeline, "labels", None) == getattr(any_generator.pipeline, "labels", None)
    assert not list((tmp_path / "again").rglob("*.bin"))
