"""What a target can do on this CPU: 8-bit sums that stay in range, and ranges at run time."""

import pytest
import torch

from diffpress import targets
from diffpress.targets import (
    FULL_RANGE,
    REDUCED_RANGE,
    TARGETS,
    find_target,
    has_dot_products,
    in_bfloat16,
    overflows,
)

WITHOUT = {"architecture": "x86_64", "avx2": True, "avx512_f": True}


@pytest.mark.parametrize(
    ("able", "has"),
    [
        (WITHOUT, False),
        (WITHOUT | {"avx512_vnni": True}, True),
        (WITHOUT | {"avx_vnni": True}, True),
        (WITHOUT | {"amx_int8": True}, True),
        (WITHOUT | {"avx512_vnni": False}, False),
        ({"architecture": "aarch64"}, True),
    ],
)
def test_who_has_dot_products(monkeypatch, able, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert has_dot_products() is has


@pytest.mark.parametrize(
    ("able", "has"),
    [
        (WITHOUT | {"avx512_vnni": True}, False),
        (WITHOUT | {"avx512_bf16": True}, True),
        (WITHOUT | {"amx_bf16": True}, True),
        (WITHOUT | {"avx512_bf16": False}, False),
        ({"architecture": "aarch64", "bf16": True}, True),
        ({"architecture": "aarch64", "fp16_arith": True}, False),
    ],
)
def test_who_multiplies_in_bfloat16(monkeypatch, able, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert in_bfloat16("auto", "cpu") is in_bfloat16("auto", torch.device("cpu")) is has
    assert in_bfloat16("bfloat16", "cpu")
    assert not in_bfloat16("float32", "cpu")
    assert not in_bfloat16("auto", "mps")


@pytest.mark.parametrize("has", [False, True])
def test_gpus_are_asked_for_instructions_of_their_own(monkeypatch, has):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has or including_emulation)
    assert in_bfloat16("auto", "cuda:1") is has


@pytest.mark.parametrize("has", [False, True])
def test_what_follows_from_that(monkeypatch, has):
    monkeypatch.setattr(targets, "has_dot_products", lambda: has)
    here = FULL_RANGE if has else REDUCED_RANGE
    assert {name: target.weight_limit() for name, target in TARGETS.items()} == {
        "onnxruntime": here,
        "openvino": here,
        "tensorrt": FULL_RANGE,  # not on the CPU
    }
    assert {name for name, target in TARGETS.items() if target.dynamic_here} == {"onnxruntime"} | (
        {"openvino"} if has else set()
    )
    for name, target in TARGETS.items():
        assert find_target(name) == target
        for limit in (FULL_RANGE, REDUCED_RANGE):
            assert overflows(name, limit) == (limit > target.weight_limit())


@pytest.mark.parametrize("has", [False, True])
def test_a_target_on_another_cpu(monkeypatch, has):
    monkeypatch.setattr(targets, "has_dot_products", lambda: has)
    for name, least in {"onnxruntime": REDUCED_RANGE, "openvino": REDUCED_RANGE, "tensorrt": FULL_RANGE}.items():
        assert find_target(name, dot_products=True).weight_limit() == FULL_RANGE
        assert find_target(name, dot_products=False).weight_limit() == least
        assert find_target(name, dot_products=True).overflows_here == (not has and name != "tensorrt")
        assert not find_target(name, dot_products=False).overflows_here


def test_two_products_fit_in_16_bits():
    assert 2 * 255 * REDUCED_RANGE <= 2**15 - 1 < 2 * 255 * (REDUCED_RANGE + 1)
