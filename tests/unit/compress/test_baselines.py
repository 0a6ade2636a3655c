"""Stock diffusers that an engine is timed beside: each in the precision that is fastest for it on the machine."""

import pytest
import torch

from diffpress.compress.timing import baseline, medium_precision
from diffpress.generator import Generator

CPU = torch.device("cpu")


@pytest.mark.parametrize(("has", "expected"), [(False, torch.float32), (True, torch.bfloat16)])
def test_compiled_is_in_bfloat16_where_there_are_instructions(dit, dit_folder, monkeypatch, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx512_bf16": has})
    monkeypatch.setattr(torch, "compile", lambda network, options: network)
    asked = []

    def load(dtype):
        asked.append(dtype)
        return dit if dtype is None else Generator.load(dit_folder, dtype=dtype)

    compiled, eager = (baseline(name, load, CPU).generator for name in ("compiled", "eager"))
    assert asked == [expected, None]
    assert compiled.denoiser.dtype == expected
    assert eager is dit  # compiling must not reach the original
    assert compiled.denoiser is not eager.denoiser


def test_medium_holds_while_it_runs_alone(dit):
    candidate = baseline("medium", lambda dtype: dit, CPU)
    assert candidate.setting is medium_precision
    before = torch.get_float32_matmul_precision()
    with candidate.setting():
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
