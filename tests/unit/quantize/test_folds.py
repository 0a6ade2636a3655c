"""Folding a channel transform leaves the function as it was; half a fold does not."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from families import make

from diffpress.errors import ParityError
from diffpress.generator import Generator, SamplingPlan
from diffpress.quantize import awq, reparam, smooth
from diffpress.quantize.folds import apply_fold, divide_modulation, find_folds
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import Activation, quantized
from diffpress.quantize.online import matches, put_behind
from diffpress.quantize.reparam import Reparam, ReparamConfig
from diffpress.quantize.smooth import Smooth, SmoothConfig
from diffpress.quantize.weights import Weights, WeightsConfig
from diffpress.targets import TARGETS
from diffpress.traceable import unread

TEXT = "transformer_blocks.0.attn2"
EXACT = 1e-4  # relative: float32 up to association


def factors(fold, seed=0):
    channels = fold.consumers[0].weight.shape[1]
    return torch.exp(0.7 * torch.randn(channels, generator=torch.Generator().manual_seed(seed)))


def test_where_it_folds_in_adaln_blocks(dit):
    assert [fold.name for fold in find_folds(dit.denoiser)] == [
        f"transformer_blocks.{block}.{place}" for block in (0, 1) for place in ("norm1", "attn1.to_out", "norm3")
    ]


def test_where_it_folds_in_cross_attention(sd):
    inside = ("norm1", "attn1.to_out", "norm2", "attn2.to_out", "norm3", "ff.net.2")
    places = ("norm", *(f"transformer_blocks.0.{name}" for name in inside))
    transformers = ("down_blocks.1.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1")
    expected = {f"{name}.{place}" for name in (*transformers, "mid_block.attentions.0") for place in places}
    assert {fold.name for fold in find_folds(sd.denoiser)} == expected


def test_where_it_folds_in_joint_attention():
    """The last block of SD3 drops the text; its first has a second attention. Flux's single blocks have one norm."""
    own = ("norm1", "norm1_context", "attn.to_out", "norm2")
    streams = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "attn.to_out")
    first, last = [f"transformer_blocks.0.{name}" for name in own], [f"transformer_blocks.1.{name}" for name in own]
    first.append("transformer_blocks.0.norm2_context")
    second = [f"transformer_blocks.0.{name}" for name in ("norm1.2", "attn2.to_out")]
    expected = {"sd3": {*first, *second, *last}, "flux": {*first, "single_transformer_blocks.0.norm"}}
    expected["qwen"] = {f"transformer_blocks.{block}.{name}" for block in (0, 1) for name in streams}
    for family, names in expected.items():
        found = {fold.name: fold for fold in find_folds(make(family).transformer)}
        assert set(found) == names
        assert all(fold.shifts for fold in found.values())
        assert found["transformer_blocks.0.attn.to_out"].parts == 2  # picture and text leave the attention apart


def test_where_it_folds_in_blocks_as_of_language_models():
    """Values of Lumina 2 have fewer heads than the output's projection reads."""
    lumina, z = ({fold.name: fold for fold in find_folds(make(name).transformer)} for name in ("lumina2", "zimage"))
    lists = {"context_refiner.0", "noise_refiner.0", "layers.0"}
    mine = ("attn.to_q", "ffn_norm1", "feed_forward.linear_2")
    assert set(lumina) == {f"{block}.{name}" for block in lists for name in mine}
    mine = ("attention.to_q", "attention.to_out", "ffn_norm1", "feed_forward.w2")
    assert set(z) == {f"{block}.{name}" for block in (*lists, "layers.1") for name in mine}
    assert not any(fold.shifts for fold in (*lumina.values(), *z.values()))


@pytest.mark.parametrize("family", ["lumina2", "zimage"])
def test_folds_in_blocks_as_of_language_models_are_exact(family, joint, first_call, relative):
    generator, before, call = joint(family)
    weights = copy.deepcopy(generator.denoiser.state_dict())
    for seed, fold in enumerate(find_folds(generator.denoiser)):
        apply_fold(fold, factors(fold, seed))
    assert relative(first_call(generator, call)[0], before) < EXACT
    generator.denoiser.load_state_dict(weights)
    for fold in find_folds(generator.denoiser):
        for change in ({"divide": lambda r: None}, {"consumers": ()}):
            apply_fold(replace(fold, **change), factors(fold))
            assert relative(first_call(generator, call)[0], before) > 10 * EXACT, fold.name
            generator.denoiser.load_state_dict(weights)


def test_what_is_pruned_or_fused_is_left_out():
    flux = make("flux").transformer
    whole, block = {fold.name for fold in find_folds(flux)}, flux.transformer_blocks[0]
    block.ff = torch.nn.Identity()
    block.attn.fuse_projections()
    gone = {f"transformer_blocks.0.{name}" for name in ("norm1", "norm1_context", "attn.to_out", "norm2")}
    assert {fold.name for fold in find_folds(flux)} == whole - gone


def test_what_is_in_codes_is_left_out(dit, context):
    """Of a block in 8 bits nothing can be folded; of one in float all but what a modulation in codes would take."""
    whole = [fold.name for fold in find_folds(dit.denoiser)]
    Int8(Int8Config(skip=("transformer_blocks.1.*",))).apply(dit, context(dit))
    assert [fold.name for fold in find_folds(dit.denoiser)] == [name for name in whole if ".1." in name]
    Weights(WeightsConfig(layers=("*.1.norm1.linear",))).apply(dit, context(dit))
    assert [fold.name for fold in find_folds(dit.denoiser)] == ["transformer_blocks.1.attn1.to_out"]
    value = dit.denoiser.transformer_blocks[1].attn1.to_v
    dit.denoiser.transformer_blocks[1].attn1.to_v = quantized(value, Activation(TARGETS["onnxruntime"]))
    assert find_folds(dit.denoiser) == []


def test_weights_are_still_balanced_beside_codes(dit, context, plant):
    plant(dit)
    Int8(Int8Config(skip=("transformer_blocks.1.*",))).apply(dit, context(dit))
    layer = dit.denoiser.transformer_blocks[1].norm1.linear
    before = layer.weight.detach().clone()
    Weights(WeightsConfig(awq=True, layers=("*.1.attn1.*",))).apply(dit, context(dit))
    rows = (layer.weight != before).any(dim=1).unflatten(0, (6, -1)).any(dim=1)
    assert rows.tolist() == [True, True, False, False, False, False]  # shift and scale of the attention's norm


def behind(denoiser, names, seed=0):
    """Put these layers behind a factor that their weights cancel."""
    channels = denoiser.get_submodule(names[0]).weight.shape[1]
    r = torch.exp(0.7 * torch.randn(channels, generator=torch.Generator().manual_seed(seed)))
    with torch.no_grad():
        for name in names:
            denoiser.get_submodule(name).weight.mul_(r)
    put_behind(denoiser, names, 1 / r)


def test_values_behind_factors_still_take_folds(sd, first_call, relative):
    before, call = first_call(sd)
    names = [fold.name for fold in find_folds(sd.denoiser)]
    values = [name for name, _ in sd.denoiser.named_modules() if name.endswith((f"{TEXT}.to_k", f"{TEXT}.to_v"))]
    behind(sd.denoiser, values)
    folds = {fold.name: fold for fold in find_folds(sd.denoiser)}
    assert list(folds) == names
    for seed, fold in enumerate(folds.values()):
        apply_fold(fold, factors(fold, seed))
    assert relative(first_call(sd, call)[0], before) < EXACT
    fold = folds[f"mid_block.attentions.0.{TEXT}.to_out"]
    apply_fold(replace(fold, divide=lambda r: None), factors(fold))
    assert relative(first_call(sd, call)[0], before) > 10 * EXACT


def test_readers_behind_factors_are_left_out(sd):
    whole, prefix = {fold.name for fold in find_folds(sd.denoiser)}, f"mid_block.attentions.0.{TEXT}"
    behind(sd.denoiser, [f"{prefix}.to_out.0"])
    assert {fold.name for fold in find_folds(sd.denoiser)} == whole - {f"{prefix}.to_out"}


AWQ = WeightsConfig(awq=True, layers=("mid_block.*.attn2.*",))


@pytest.mark.parametrize("second", [Reparam(ReparamConfig()), Smooth(SmoothConfig(alpha=0.5)), Weights(AWQ)])
def test_stages_follow_factors_at_run_time(sd, context, second):
    given = context(sd, "openvino")
    values = [name for name, _ in sd.denoiser.named_modules() if name.endswith((f"{TEXT}.to_k", f"{TEXT}.to_v"))]
    behind(sd.denoiser, values)
    second.check(sd, given.target)
    second.apply(sd, given)  # which refuses what does not cancel


@pytest.mark.parametrize(
    ("settings", "own"),
    [({}, (3, 1)), ({"only_cross_attention": True}, (1, 1)), ({"double_self_attention": True}, (3, 3))],
)
def test_keys_and_values_of_a_text_are_no_readers(settings, own, relative):
    torch.manual_seed(0)
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=12, **settings).eval()
    x, text = torch.randn(2, 5, 16), None if block.double_self_attention else torch.randn(2, 3, 12)
    model, inputs = torch.nn.Sequential(block), {"encoder_hidden_states": text}
    readers = {fold.name: len(fold.consumers) for fold in find_folds(model)}
    assert (readers["0.norm1"], readers["0.norm2"]) == own
    with torch.no_grad():
        before = block(x, **inputs)
        for fold in find_folds(model):
            apply_fold(fold, factors(fold))
        assert relative(block(x, **inputs), before) < EXACT
        fold = find_folds(model)[0]
        apply_fold(replace(fold, consumers=()), factors(fold))
        assert relative(block(x, **inputs), before) > 10 * EXACT


@pytest.fixture
def joint(first_call):
    """Of a family with joint attention: the generator, its output, and the call of it."""

    def make_one(name):
        generator = Generator(make(name))
        plan = SamplingPlan(steps=2, guidance_scale=3.0, height=32, width=32)
        call = generator.record(["a cat", "a dog"], seeds=[0, 1], plan=plan, limit=1)[0]
        return generator, *first_call(generator, call)

    return make_one


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen"])
def test_folds_around_joint_attention_are_exact(family, joint, first_call, relative):
    generator, before, call = joint(family)
    weights = copy.deepcopy(generator.denoiser.state_dict())
    names = {layer: name for name, layer in generator.denoiser.named_modules()}
    for seed, fold in enumerate(find_folds(generator.denoiser)):
        apply_fold(fold, factors(fold, seed), shifts(fold, seed))
    assert relative(first_call(generator, call)[0], before) < EXACT
    generator.denoiser.load_state_dict(weights)
    nobody = unread(generator.denoiser)
    for fold in find_folds(generator.denoiser):
        read = [layer for layer in fold.consumers if not matches(names[layer], nobody)]
        alone = [{"consumers": (layer,)} for layer in read if len(read) == len(fold.consumers) > 1]
        lost = [{"divide": lambda r: None}, *alone] if read else []
        for change in lost:
            apply_fold(replace(fold, **change), factors(fold))
            assert relative(first_call(generator, call)[0], before) > 5 * EXACT, fold.name
            generator.denoiser.load_state_dict(weights)


@pytest.mark.parametrize("family", ["dit", "sd"])
def test_all_folds_together_are_exact(family, request, first_call, relative):
    generator = request.getfixturevalue(family)
    before, call = first_call(generator)
    weights = copy.deepcopy(generator.denoiser.state_dict())
    for seed, fold in enumerate(find_folds(generator.denoiser)):
        apply_fold(fold, factors(fold, seed))
    assert relative(first_call(generator, call)[0], before) < EXACT
    changed = {name for name, value in generator.denoiser.state_dict().items() if not torch.equal(value, weights[name])}
    assert len(changed) > 2 * len(find_folds(generator.denoiser))  # each has a consumer and a producer


def shifts(fold, seed=0):
    return torch.randn(fold.channels, generator=torch.Generator().manual_seed(seed + 100))


def test_where_a_shift_can_be_folded(dit, sd):
    assert all(fold.shifts for fold in find_folds(dit.denoiser))
    carrying = {fold.name.split(".")[-1] for fold in find_folds(sd.denoiser) if fold.shifts}
    assert carrying == {"norm", "norm3"}  # queries, keys and values have no bias, and a gate would scale the shift


@pytest.mark.parametrize("family", ["dit", "sd"])
def test_shifts_are_exact(family, request, first_call, relative):
    generator = request.getfixturevalue(family)
    before, call = first_call(generator)
    folds = [fold for fold in find_folds(generator.denoiser) if fold.shifts]
    for seed, fold in enumerate(folds):
        apply_fold(fold, factors(fold, seed), shifts(fold, seed))
    assert relative(first_call(generator, call)[0], before) < EXACT
    for fold in folds:
        for half in (replace(fold, subtract=lambda b: None), replace(fold, consumers=())):
            weights = copy.deepcopy(generator.denoiser.state_dict())
            apply_fold(half, torch.ones(fold.channels), shifts(fold))
            assert relative(first_call(generator, call)[0], before) > 10 * EXACT, fold.name
            generator.denoiser.load_state_dict(weights)


def test_a_shift_that_cannot_be_folded_is_refused(sd):
    fold = next(fold for fold in find_folds(sd.denoiser) if not fold.shifts)
    with pytest.raises(ValueError, match="a shift cannot be folded here"):
        apply_fold(fold, factors(fold), shifts(fold))


@pytest.mark.parametrize("family", ["dit", "sd"])
def test_half_a_fold_is_not(family, request, first_call, relative):
    generator = request.getfixturevalue(family)
    before, call = first_call(generator)
    weights = copy.deepcopy(generator.denoiser.state_dict())
    for fold in find_folds(generator.denoiser):
        for half in (replace(fold, divide=lambda r: None), replace(fold, consumers=())):
            apply_fold(half, factors(fold))
            assert relative(first_call(generator, call)[0], before) > 10 * EXACT, fold.name
            generator.denoiser.load_state_dict(weights)


STAGES = {
    "quantize.smooth": (smooth, Smooth(SmoothConfig(alpha=0.5))),
    "quantize.reparam": (reparam, Reparam(ReparamConfig())),
    "quantize.weights": (awq, Weights(WeightsConfig(awq=True))),
}


@pytest.mark.parametrize("method", STAGES)
@pytest.mark.parametrize("half", [{"divide": lambda r: None}, {"consumers": ()}])
def test_a_stage_that_leaves_half_a_fold_out_is_stopped(dit_folder, plant, context, monkeypatch, method, half):
    (module, stage), whole = STAGES[method], apply_fold
    for wrong in ({}, half):
        generator = Generator.load(dit_folder)
        plant(generator)
        monkeypatch.setattr(module, "apply_fold", lambda fold, *by, wrong=wrong: whole(replace(fold, **wrong), *by))
        stopped = pytest.raises(ParityError, match=rf"{method}: what was folded does not cancel")
        with stopped if wrong else nullcontext():
            stage.apply(generator, context(generator))


def test_modulation_closed_form():
    linear = torch.nn.Linear(3, 6 * 4)
    c, r = torch.randn(2, 3), torch.rand(4) + 0.5
    before = linear(c).detach().reshape(2, 6, 4)
    with torch.no_grad():
        divide_modulation(linear, r, shift=3, scale=4)
    after = linear(c).detach().reshape(2, 6, 4)
    torch.testing.assert_close(after[:, 3], before[:, 3] / r)
    torch.testing.assert_close(1 + after[:, 4], (1 + before[:, 4]) / r)
    torch.testing.assert_close(after[:, [0, 1, 2, 5]], before[:, [0, 1, 2, 5]])
    assert not torch.allclose(after[:, 4], before[:, 4] / r)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_factors_must_be_positive(dit, bad):
    fold = find_folds(dit.denoiser)[0]
    r = factors(fold)
    r[3] = bad
    with pytest.raises(ValueError, match="must be positive"):
        apply_fold(fold, r)
