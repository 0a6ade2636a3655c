"""Low-rank adapters: a student that trains a few small matrices beside every linear layer (Hu et al. 2021, LoRA)."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from diffpress.errors import MissingDependencyError


def require_adapters(setting: str) -> None:
    """Raises MissingDependencyError, with the ``setting`` that asks for adapters, where peft is not installed."""
    if find_spec("peft") is None:
        raise MissingDependencyError("peft", "lora", f"{setting} (without adapters: null)")


def add_adapters(network: nn.Module, rank: int, *, seed: int) -> None:
    """Freeze ``network`` and give each Linear layer W x the sum W x + B A x, A [rank, in] random, B [out, rank] zero.

    The output is the same as before. Needs peft (see `require_adapters`).
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), network)


@torch.no_grad()
def merge_adapters(network: nn.Module) -> None:
    """W <- W + B A in the weight's own precision, float32 in training: the stock layers are back."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            network.set_submodule(name, module.get_base_layer())
    network.requires_grad_(True)
