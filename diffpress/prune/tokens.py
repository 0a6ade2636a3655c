"""Fewer tokens in chosen layers of a transformer or U-Net: static shapes, so that the engine skips the work.

pool: attention reads keys and values averaged over cells of tokens. coarse: whole blocks run on the averages and add
what they change to every token. merge: attention runs on fewer tokens, the most redundant ones averaged into others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffpress.budget import Option, choose
from diffpress.config import config
from diffpress.errors import ConfigError
from diffpress.generator import Call, Generator
from diffpress.prune.latency import Table, time_left, told, within
from diffpress.prune.reduction import CoarseBlocks, MergedTokens, PooledKeys, TokenGrid
from diffpress.recorded import mean_error, record
from diffpress.stage import Applied, Context
from diffpress.targets import Target

Method = Literal["pool", "coarse", "merge"]


@config
class TokensConfig:
    """Which tokens are reduced, and where; one of blocks, error and latency."""

    method: Method = "pool"
    """pool: keys and values averaged over cells; coarse: blocks on the averages; merge: similar tokens as one."""
    pool: Annotated[int, Field(ge=1)] = 2
    """Edge of a cell in tokens; for merge, of each cell one token is never merged into another."""
    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the tokens that merge takes away; at most 1 - 1 / pool^2."""
    blocks: tuple[str, ...] | None = None
    """Names of the attention layers (for coarse: of the blocks) that are reduced, in the denoiser."""
    error: Annotated[float, Field(gt=0)] | None = None
    """Largest change of the denoiser's output, relative, over recorded calls; as much is reduced as that allows."""
    latency: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of a denoiser call's time on the engine that is kept; reduced is what changes the output least."""
    calls: Annotated[int, Field(ge=1)] = 8
    """Recorded calls that changes of the output are measured on."""

    @model_validator(mode="after")
    def _fits(self) -> TokensConfig:
        given = [name for name in ("blocks", "error", "latency") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'no budget'} given; allowed: one of blocks, error, latency")
        if self.method == "merge" and self.ratio > 1 - 1 / self.pool**2:
            raise ValueError(f"ratio {self.ratio:g} is more than pool {self.pool} leaves; allowed: 0 to 1 - 1 / pool^2")
        return self


def candidates(network: nn.Module, method: Method) -> dict[str, Any]:
    """Layers of ``network`` that could be reduced, by name; ConfigError for a network in 8 bits.

    Attentions are those whose processor is a stock one and that read nothing else than their queries do; of them merge
    leaves out those with a norm or a residual of their own. Blocks are the stock transformer blocks, unless they add
    position embeddings of their own.
    """
    if any(buffer.dtype in (torch.int8, torch.uint8) for buffer in network.buffers()):
        raise ConfigError(f"{type(network).__name__} is quantized already; allowed: tokens are reduced before")
    found: dict[str, Any] = {}
    for name, module in network.named_modules():
        if method == "coarse":
            parent = network.get_submodule(name.rpartition(".")[0])
            fits = isinstance(module, BasicTransformerBlock) and module.pos_embed is None
            fits = fits and isinstance(parent, nn.ModuleList)
            processors = (getattr(part, "processor", None) for part in module.modules())
            fits = fits and not any(isinstance(each, PooledKeys | MergedTokens) for each in processors)
        else:
            fits = isinstance(module, Attention) and not module.is_cross_attention
            fits = fits and type(module.processor) in (AttnProcessor, AttnProcessor2_0)
            if method == "merge":
                fits = fits and module.group_norm is None and not module.residual_connection
        if fits:
            found[name] = module
    return found


def find_grids(generator: Generator, context: Context, method: Method) -> dict[str, tuple[int, int]]:
    """Height and width in tokens of what each candidate reads in one denoiser call, where that is a whole picture.

    An attention with a mask, or that is given something else to read, reads more than a picture.
    """
    network = generator.denoiser
    seen: dict[str, tuple[Tensor, bool]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            other = kwargs.get("encoder_hidden_states") is not None or kwargs.get("attention_mask") is not None
            seen[name] = (args[0], other and method != "coarse")

        return hook

    modules = candidates(network, method)
    handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in modules.items()]
    try:
        call = generator.record(context.conditions[:1], seeds=context.seeds[:1], plan=context.plan, limit=1)[0]
    finally:
        for handle in handles:
            handle.remove()
    grids = {name: grid_of(x, next(iter(call.inputs.values()))) for name, (x, other) in seen.items() if not other}
    return {name: grid for name, grid in grids.items() if grid is not None}


def grid_of(x: Tensor, x_t: Tensor) -> tuple[int, int] | None:
    """Height and width of a feature map [n, c, h, w], or of tokens [n, h w, c] that cover x_t in square patches."""
    if x.ndim == 4:
        return int(x.shape[2]), int(x.shape[3])
    if x_t.ndim != 4:
        return None
    height, width = x_t.shape[2:]
    patch = math.isqrt(height * width // x.shape[1])
    fits = patch and not (height % patch or width % patch) and height * width == patch**2 * x.shape[1]
    return (height // patch, width // patch) if fits else None


def install(network: nn.Module, method: Method, grids: Mapping[str, TokenGrid], ratio: float) -> Callable[[], None]:
    """Reduce the tokens of the layers in ``grids``, in place; returns what undoes it.

    Blocks that follow each other share one `CoarseBlocks`, so that their names change; attentions keep theirs.
    """
    undo: list[Callable[[], None]] = []
    if method == "coarse":
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in grids):
            undo.append(_coarsen(network, parent, grids))
    else:
        for name, grid in grids.items():
            attention: Any = network.get_submodule(name)
            before = attention.processor
            attention.processor = (
                PooledKeys(grid, before)
                if method == "pool"
                else MergedTokens(grid, round(ratio * grid.height * grid.width), before)
            )
            undo.append(partial(setattr, attention, "processor", before))

    def undo_all() -> None:
        for action in undo:
            action()

    return undo_all


def _coarsen(network: nn.Module, parent: str, grids: Mapping[str, TokenGrid]) -> Callable[[], None]:
    """Put each run of blocks of the list ``parent`` that are in ``grids`` into one `CoarseBlocks`."""
    above, _, own = parent.rpartition(".")
    owner, before = network.get_submodule(above), cast(nn.ModuleList, network.get_submodule(parent))
    after: list[nn.Module] = []
    run: list[nn.Module] = []
    for index, block in enumerate(before):
        grid = grids.get(f"{parent}.{index}")
        if grid is None:
            run = []
            after.append(block)
        elif run:
            run.append(block)
            after[-1] = CoarseBlocks(run, grid)
        else:
            run = [block]
            after.append(CoarseBlocks(run, grid))
    setattr(owner, own, nn.ModuleList(after))
    return partial(setattr, owner, own, before)


def work(module: Any, tokens: int, method: Method, kept: float) -> float:
    """How many multiply-adds a picture saves in a layer of so many ``tokens``, of which the share ``kept`` stays."""
    attention = module if isinstance(module, Attention) else module.attn1
    parts = [module.attn1, module.attn2, module.ff] if method == "coarse" else [module]
    layers = [m for part in parts if part is not None for m in part.modules() if isinstance(m, nn.Linear)]
    if method == "pool":
        layers = [attention.to_k, attention.to_v]
    pairs = 1 - (kept if method == "pool" else kept**2)
    linear = (1 - kept) * sum(layer.weight.numel() for layer in layers)
    return tokens * (linear + pairs * tokens * 2 * getattr(attention, "inner_dim", 0))


def milliseconds(name: str, method: Method, kept: float, table: Table) -> float:
    """Of a denoiser call, what is saved in layer ``name``: its time is taken to be in proportion to its tokens."""
    whole = table.get(name, 0.0)
    if method == "pool":  # queries and output stay
        whole -= sum(table.get(f"{name}.{part}", 0.0) for part in ("to_q", "to_out"))
    return (1 - kept) * whole


class Tokens:
    """``prune.tokens``: leaves a float generator whose chosen layers work on fewer tokens, for one size of picture."""

    Config: ClassVar[type] = TokensConfig

    def __init__(self, config: TokensConfig) -> None:
        self.config = config

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError where nothing can be reduced, a named layer is not there, or layers are quantized."""
        self._named(generator.denoiser, candidates(generator.denoiser, self.config.method))

    def apply(self, generator: Generator, context: Context) -> Applied:
        """Raises ConfigError for a picture size that cells do not tile, or a latency that cannot be met."""
        settings, network = self.config, generator.denoiser
        grids = self._grids(network, find_grids(generator, context, settings.method))
        table = self._table(generator, context)
        if table is not None:
            self._refuse_too_little(grids, table)
        calls = record(generator, context, settings.calls, "Token reduction: recording")
        errors: dict[str, float] = {}
        count, time = len(grids), None
        if settings.blocks is None:
            with context.progress.task("Token reduction: measuring", total=len(grids)) as advance:
                for name in grids:
                    errors[name] = self._error(network, {name: grids[name]}, calls)
                    advance(1)
            grids, time = self._within(generator, grids, errors, calls, context, table)
        install(network, settings.method, grids, settings.ratio)
        error = mean_error(network, calls) ** 0.5
        metadata = {
            "method": settings.method,
            "pool": settings.pool,
            "ratio": settings.ratio,
            "grids": {name: [grid.height, grid.width] for name, grid in grids.items()},
            "errors": errors,
            "output_error": error,
            "latency": time,
        }
        what = {"pool": "keys and values pooled", "coarse": "blocks coarse", "merge": "tokens merged"}[settings.method]
        summary = f"{what} in {len(grids)} of {count} layers; output moved by {error:.1%}"
        if time is not None:
            summary += f"; {told(time, float(settings.latency or 1))}"
        return Applied(generator, metadata, summary)

    def _named(self, network: nn.Module, known: Mapping[str, Any]) -> None:
        if not known:
            raise ConfigError(f"{type(network).__name__} has no layer whose tokens {self.config.method} can reduce")
        missing = [name for name in self.config.blocks or () if name not in known]
        if missing:
            raise ConfigError(
                f"{type(network).__name__} has no {', '.join(missing)} whose tokens {self.config.method} can reduce; "
                f"allowed: {', '.join(known)}"
            )

    def _grids(self, network: nn.Module, found: Mapping[str, tuple[int, int]]) -> dict[str, TokenGrid]:
        """Of the named layers, or of all that cells tile; ConfigError where one is named and not tiled, or none is."""
        self._named(network, found)
        pool = self.config.pool
        if self.config.blocks is not None:
            return {name: TokenGrid(*found[name], pool) for name in self.config.blocks}
        tiled = {name: grid for name, grid in found.items() if not (grid[0] % pool or grid[1] % pool)}
        if not tiled:
            TokenGrid(*max(found.values()), pool)  # says what is allowed
        return {name: TokenGrid(*grid, pool) for name, grid in tiled.items()}

    def _table(self, generator: Generator, context: Context) -> Table | None:
        """Latencies by submodule, where there are any."""
        if self.config.latency is not None and context.latency is None:
            raise ConfigError(f"latency is {self.config.latency:g}, but there are no timings; allowed: error, blocks")
        return None if self.config.latency is None or context.latency is None else context.latency(generator)

    def _error(self, network: nn.Module, grids: Mapping[str, TokenGrid], calls: Sequence[Call]) -> float:
        """Relative change of the output with the tokens of ``grids`` reduced; the network is left as it was."""
        with reduced(network, self.config.method, grids, self.config.ratio):
            return mean_error(network, calls) ** 0.5

    def _within(
        self,
        generator: Generator,
        grids: Mapping[str, TokenGrid],
        errors: Mapping[str, float],
        calls: Sequence[Call],
        context: Context,
        table: Table | None,
    ) -> tuple[dict[str, TokenGrid], float | None]:
        """What is reduced, and the share of a call's time that is left, where that is the budget."""
        settings, network = self.config, generator.denoiser
        if table is None or settings.latency is None:
            return self._chosen(network, grids, errors, calls, None), None

        def by(table: Table) -> tuple[dict[str, TokenGrid], float]:
            self._refuse_too_little(grids, table)
            chosen = self._chosen(network, grids, errors, calls, table)
            saved = sum(milliseconds(name, settings.method, self._kept, table) for name in chosen)
            return chosen, 1 - saved / table[""]

        def measure(chosen: Mapping[str, TokenGrid]) -> float:
            def reduce(other: nn.Module) -> None:
                install(other, settings.method, chosen, settings.ratio)

            return time_left(generator, context, reduce)

        return within(settings.latency, table, by, measure)

    def _chosen(
        self,
        network: nn.Module,
        grids: Mapping[str, TokenGrid],
        errors: Mapping[str, float],
        calls: Sequence[Call],
        table: Table | None,
    ) -> dict[str, TokenGrid]:
        """What is reduced under the budget."""
        method, kept = self.config.method, self._kept
        if table is not None:
            saved = {name: milliseconds(name, method, kept, table) for name in grids}
            return {name: grids[name] for name in self._fitting(errors, saved, table[""])}
        saved = {
            name: work(network.get_submodule(name), grid.height * grid.width, method, kept)
            for name, grid in grids.items()
        }
        chosen: dict[str, TokenGrid] = {}
        for name in sorted(grids, key=lambda name: errors[name] ** 2 / max(saved[name], 1e-30)):
            more = {other: grid for other, grid in grids.items() if other in chosen or other == name}
            if self._error(network, more, calls) <= float(self.config.error or 0.0):
                chosen = more
        if not chosen:
            raise ConfigError(
                f"error {self.config.error:g} cannot be met by any layer; the closest that can is "
                f"{min(errors.values()):.3g}, in {min(errors, key=errors.__getitem__)}"
            )
        return chosen

    @property
    def _kept(self) -> float:
        """Share of the tokens that stays."""
        return 1 - self.config.ratio if self.config.method == "merge" else 1 / self.config.pool**2

    def _refuse_too_little(self, grids: Mapping[str, TokenGrid], table: Table) -> None:
        """ConfigError where all layers together do not save what the budget of latency asks for."""
        share, whole = float(self.config.latency or 1.0), table[""]
        least = whole - sum(milliseconds(name, self.config.method, self._kept, table) for name in grids)
        if least > share * whole:
            raise ConfigError(
                f"latency {share:g} cannot be met by {self.config.method} {self.config.pool}; the closest that can is "
                f"{math.ceil(least / whole * 1000) / 1000:g}"
            )

    def _fitting(self, errors: Mapping[str, float], saved: Mapping[str, float], whole: float) -> list[str]:
        """Layers of the least sum of squared errors that save enough."""
        share = float(self.config.latency or 1.0)
        least = whole - sum(saved.values())
        items = [[Option(0.0, saved[name]), Option(errors[name] ** 2, 0.0)] for name in saved]
        chosen = choose(items, share * whole - least)
        return [name for name, index in zip(saved, chosen, strict=True) if index == 1]

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Reduce the same layers; weights are loaded afterwards."""
        pool = metadata["pool"]
        grids = {name: TokenGrid(height, width, pool) for name, (height, width) in metadata["grids"].items()}
        install(generator.denoiser, metadata["method"], grids, metadata["ratio"])


@contextmanager
def reduced(network: nn.Module, method: Method, grids: Mapping[str, TokenGrid], ratio: float) -> Iterator[None]:
    """`install` for the length of the block."""
    undo = install(network, method, grids, ratio)
    try:
        yield
    finally:
        undo()
