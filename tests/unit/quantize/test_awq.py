"""Activation-aware scales and clips: never worse than the nearest codes, exact where they fold."""

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from diffpress.quantize.awq import (
    EXPONENTS,
    UNCLIPPED,
    balance,
    best_clip,
    best_scales,
    channel_scales,
    clip_ratios,
    dequantized,
    find_text_folds,
    relative_error,
    watching,
)
from diffpress.quantize.folds import Fold, apply_fold, find_folds
from diffpress.quantize.streams import Rows
from diffpress.quantize.weight_only import Form, group_codes, weight_only

FOUR = Form("tensorrt", 4, 32)
EXACT = 1e-4  # relative: float32 up to association


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def outliers():
    """Rows [256, 64] whose every eighth channel is 30 times larger, and a weight [48, 64]."""
    x = random(256, 64)
    x[:, ::8] *= 30
    return x, random(48, 64, seed=1)


def output_error(weight, quantized, x):
    return float((x @ (quantized - weight).T).norm() / (x @ weight.T).norm())


def test_scales_closed_form():
    x = torch.tensor([[1.0, -8.0, 0.0, 2.0], [3.0, 8.0, 0.0, -2.0]])  # mean |x| = 2, 8, 0, 2
    expected = torch.tensor([0.5**0.5, 2**0.5, 1.0, 0.5**0.5])  # s^0.5 over the root of max min
    torch.testing.assert_close(channel_scales(x, 0.5), expected)
    assert torch.equal(channel_scales(x, 0.0), torch.ones(4))
    assert torch.equal(channel_scales(torch.zeros(2, 3), 0.5), torch.ones(3))


def test_exponent_zero_is_the_nearest_code(outliers):
    x, weight = outliers
    assert EXPONENTS[0] == 0
    s = channel_scales(x, 0.0)
    assert torch.equal(group_codes(weight * s, bits=4, group=32)[0], group_codes(weight, bits=4, group=32)[0])
    other = channel_scales(x, 0.5)
    assert not torch.equal(group_codes(weight * other, bits=4, group=32)[0], group_codes(weight, bits=4, group=32)[0])


def test_selected_scales_are_never_worse_and_win_on_outliers(outliers):
    x, weight = outliers
    for rows, gain in ((x, 0.7), (random(256, 64, seed=2), 1.0)):
        s = best_scales(rows, [(rows, weight)], FOUR)
        chosen, nearest = (
            output_error(weight, quantized, rows)
            for quantized in (dequantized(weight * s, FOUR) / s, dequantized(weight, FOUR))
        )
        assert chosen <= gain * nearest
    wrong = best_scales(x, [(x, weight)], FOUR).roll(1)  # of the channel beside
    assert output_error(weight, dequantized(weight * wrong, FOUR) / wrong, x) > output_error(
        weight, dequantized(weight, FOUR), x
    )


def test_clip_finds_the_lone_large_weight():
    x, weight = random(256, 64), 0.1 * random(48, 64, seed=1).clamp(-2, 2)
    weight[0, 5] = 0.32  # a little beyond the rest of its group, on a channel that carries nothing
    x[:, 5] = 0
    ratios = clip_ratios(weight, x, FOUR)
    assert ratios.shape == (48, 2)
    assert float(ratios[0, 0]) < 0.8
    assert bool(((ratios >= 0.5) & (ratios <= 1)).all())
    nearest, clipped = (output_error(weight, dequantized(weight, FOUR, clip=clip), x) for clip in (1.0, ratios))
    assert clipped < nearest


def test_selected_clip_is_never_worse(outliers):
    x, weight = outliers
    layer = nn.Linear(64, 48)
    with torch.no_grad():
        layer.weight.copy_(weight)
    for form in (FOUR, Form("tensorrt", 4, 64), Form("tensorrt", 8, None)):
        chosen = dequantized(weight, form, clip=best_clip("net.ff", layer, x, form))
        assert output_error(weight, chosen, x) <= output_error(weight, dequantized(weight, form), x)
    unclipped = ("blocks.0.attn.to_q", "layers.1.self_attn.k_proj", "block.0.SelfAttention.q", "0.attn2.to_k.layer")
    for name in unclipped:  # the last is behind a factor
        assert best_clip(name, layer, x, FOUR) == 1.0, UNCLIPPED
    for name in ("blocks.0.attn.to_v", "blocks.0.attn.to_v.layer"):
        assert isinstance(best_clip(name, layer, x, FOUR), torch.Tensor)


def test_indices_are_watched_as_they_are():
    table = nn.Embedding(5, 2)
    with watching({"table": table}) as seen:
        table(torch.tensor([[3, 1], [4, 1]]))
    assert seen["table"].values.sort().values.tolist() == [1, 1, 3, 4]
    assert seen["table"].values.dtype == torch.int64


def test_relative_error_of_a_known_twin():
    layer, twin, seen = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), Rows()
    seen.update(random(10, 4))
    with torch.no_grad():
        twin.weight.copy_(1.25 * layer.weight)
    assert relative_error(twin, layer, seen) == pytest.approx(0.25, rel=1e-5)


def make_t5(gated):
    torch.manual_seed(0)
    kind = "gated-gelu" if gated else "relu"
    sizes = {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj=kind)).eval()


def make_language_model(name, *, values):
    """Two layers of four heads; queries share ``values`` heads of keys and values."""
    torch.manual_seed(0)
    kind, config = {
        "qwen2": (Qwen2Model, Qwen2Config),
        "qwen3": (Qwen3Model, Qwen3Config),
        "gemma2": (Gemma2Model, Gemma2Config),
        "mistral": (MistralModel, MistralConfig),
    }[name]
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    model = kind(config(**sizes, num_attention_heads=4, num_key_value_heads=values, pad_token_id=0)).eval()
    with torch.no_grad():
        for layer, weight in ((n, p) for n, p in model.named_parameters() if p.ndim == 1):
            weight.add_(0.3 * random(*weight.shape, seed=len(layer)))  # norms and biases that are not all the same
    return model


@torch.no_grad()
def encode(model):
    ids = torch.arange(24).reshape(2, 12)
    return model(ids).last_hidden_state


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("clip", 3),
        ("gated", 8),
        ("plain", 6),
        ("qwen2", 8),
        ("qwen2 grouped", 6),
        ("qwen3", 8),
        ("gemma2", 8),
        ("gemma2 grouped", 6),
        ("mistral", 8),
    ],
)
def test_text_folds_are_exact_and_half_a_fold_is_not(kind, count, sd, relative):
    if kind == "clip":
        model = sd.pipeline.text_encoder
    elif kind in ("gated", "plain"):
        model = make_t5(kind == "gated")
    else:
        name, _, grouped = kind.partition(" ")
        model = make_language_model(name, values=2 if grouped else 4)
    folds, before = find_text_folds(model), encode(model)
    assert len(folds) == count
    for seed, fold in enumerate(folds):
        apply_fold(fold, torch.exp(0.7 * random(fold.consumers[0].weight.shape[1], seed=seed)))
    assert relative(encode(model), before) < EXACT
    with torch.no_grad():
        folds[-1].divide(torch.full((folds[-1].consumers[0].weight.shape[1],), 2.0))
    assert relative(encode(model), before) > 10 * EXACT


def test_norms_that_multiply_by_something_else_take_no_scales():
    class Squared(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return x * self.weight**2

    model = make_language_model("qwen2", values=4)
    for layer in model.layers:
        layer.input_layernorm = Squared(layer.input_layernorm.weight)
    names = {fold.name for fold in find_text_folds(model)}
    assert names == {f"layers.{n}.{part}" for n in (0, 1) for part in ("o_proj", "mlp_norm", "down_proj")}


def test_denoisers_have_no_text_folds(dit, sd):
    assert not find_text_folds(dit.denoiser)
    assert not find_text_folds(sd.denoiser)


@pytest.mark.parametrize("bits", [4, 8])
def test_balancing_keeps_the_function_and_lowers_the_error(bits, relative):
    model, errors = make_t5(gated=True), {}
    with torch.no_grad():
        for fold in find_text_folds(model):  # planted outliers: every eighth channel 20 times larger
            r = torch.ones(fold.consumers[0].weight.shape[1])
            r[::8] = 1 / 20
            apply_fold(fold, r)
    before, form = encode(model), Form("tensorrt", bits, 32)
    for balanced in (False, True):
        layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        with watching(layers) as seen:
            encode(model)
        if balanced:
            assert balance(find_text_folds(model), layers, seen, form) == 8
            assert relative(encode(model), before) < EXACT
            for name, layer in layers.items():  # the rows that were seen follow the fold
                rows = seen[name].values
                with watching({name: layer}) as again:
                    encode(model)
                torch.testing.assert_close(rows, again[name].values, rtol=1e-3, atol=1e-4)
        errors[balanced] = sum(
            relative_error(weight_only(layer, form), layer, seen[name]) for name, layer in layers.items()
        )
    assert errors[True] < 0.7 * errors[False]


def test_each_reader_is_judged_on_its_own_rows():
    """Picture and text carry in other channels; the rows of one say nothing of the other's layer."""
    torch.manual_seed(0)
    form, layers = Form("tensorrt", 4, 64), {"image": nn.Linear(64, 64), "text": nn.Linear(64, 64)}
    inputs = {"image": random(400, 64), "text": random(400, 64, seed=1)}
    inputs["image"][:, :8] *= 20
    inputs["text"][:, 32:40] *= 20
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    def error(s):
        return sum(
            float((inputs[name] @ (dequantized(weight * s, form) / s - weight).T).square().sum())
            for name, weight in weights.items()
        )

    seen, values = {name: Rows() for name in inputs}, torch.ones(64)
    for name, x in inputs.items():
        seen[name].update(x)
    balance([Fold("to_out", tuple(layers.values()), values.div_, parts=2)], layers, seen, form)
    assert error(1 / values) < 0.9 * error(torch.ones(64))
    of_one = best_scales(inputs["image"], [(inputs["image"], weight) for weight in weights.values()], form)
    assert error(of_one) > error(torch.ones(64))


def test_folds_with_a_reader_that_stays_float_are_left_alone(dit):
    fold, rows = find_folds(dit.denoiser)[0], Rows()
    rows.update(random(20, 16) * torch.logspace(-2, 2, 16))
    readers = dict(zip("qkv", fold.consumers, strict=True))
    seen, form, before = dict.fromkeys("qkv", rows), Form("tensorrt", 4, 16), readers["q"].weight.detach().clone()
    assert balance([fold], {"q": readers["q"]}, seen, form) == 0
    assert torch.equal(readers["q"].weight, before)
    balance([fold], readers, seen, form)
    assert not torch.equal(readers["q"].weight, before)
