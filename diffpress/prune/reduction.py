"""Fewer tokens in static shapes: keys and values pooled, blocks on a coarse grid, similar tokens merged.

All shapes follow from the grid that a layer was fitted for, so each exports to a static graph. A network on another
grid is refused, not approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffpress.errors import ConfigError


@dataclass(frozen=True)
class TokenGrid:
    """Tokens of a picture, row by row, in cells of ``pool`` x ``pool``."""

    height: int
    width: int
    pool: int

    def __post_init__(self) -> None:
        if self.height % self.pool or self.width % self.pool:
            raise ConfigError(
                f"pool {self.pool} does not tile a grid of {self.height} x {self.width} tokens; allowed: "
                f"{', '.join(str(size) for size in self.tiling())}"
            )

    def tiling(self) -> list[int]:
        """Every size of a cell that tiles the grid."""
        sizes = range(1, min(self.height, self.width) + 1)
        return [size for size in sizes if not (self.height % size or self.width % size)]

    def cells(self, x: Tensor) -> Tensor:
        """[n, tokens, c] as [n, rows, pool, columns, pool, c]; ConfigError for tokens of another grid."""
        if x.shape[1] != self.height * self.width:
            raise ConfigError(
                f"{x.shape[1]} tokens, but token reduction was fitted for {self.height} x {self.width}: another "
                "picture size; allowed: the size that the stage ran with"
            )
        return x.unflatten(1, (self.height // self.pool, self.pool, self.width // self.pool, self.pool))

    def average(self, x: Tensor) -> Tensor:
        """Mean over each cell, [n, tokens, c] to [n, cells, c]; x itself for cells of one token."""
        cells = self.cells(x)  # [n, rows, pool, columns, pool, c]
        return x if self.pool == 1 else cells.mean((2, 4)).flatten(1, 2)

    def spread(self, x: Tensor) -> Tensor:
        """The value of each cell for all its tokens, [n, cells, c] to [n, tokens, c]; `average` undoes it."""
        rows, columns = self.height // self.pool, self.width // self.pool
        cells = x.unflatten(1, (rows, 1, columns, 1))
        return cells.expand(-1, rows, self.pool, columns, self.pool, -1).flatten(1, 4)  # [n, tokens, c]


class PooledKeys:
    """Attention processor: softmax(q k(Px)^T) v(Px), P the mean over cells of tokens (Lumina-Next, Zhuo et al. 2024).

    k and v are affine, so they are computed from pooled tokens, which saves their projections too. ``inner`` is the
    stock processor that does the rest.
    """

    def __init__(self, grid: TokenGrid, inner: Any) -> None:
        self.grid, self.inner = grid, inner

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.grid})"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """What ``inner`` gives for queries of all tokens; only for self-attention without a mask."""
        assert encoder_hidden_states is None
        assert attention_mask is None
        tokens = (
            hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
        )  # [n, tokens, c]
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        return self.inner(attn, hidden_states, self.grid.average(tokens), None, temb)


class MergedTokens:
    """Attention processor: on tokens of which the ``count`` most redundant are averaged into others (ToMe).

    One token of each cell, its first, is a destination; the ``count`` others that are most like their best destination
    (cosine of the attention's input) are merged into it, and get what it gets (Bolya & Hoffman 2023, section 3, with
    fixed destinations). Attention alone sees fewer tokens: queries, keys and values.
    """

    def __init__(self, grid: TokenGrid, count: int, inner: Any) -> None:
        self.grid, self.count, self.inner = grid, count, inner
        places = grid.cells(torch.arange(grid.height * grid.width)[None, :, None])[0, ..., 0]  # [rows, p, columns, p]
        self.destinations = places[:, 0, :, 0].flatten()
        first = torch.zeros(grid.height * grid.width, dtype=torch.bool).index_fill(0, self.destinations, True)
        self.sources = (~first).nonzero().flatten()
        self.order = torch.cat([self.sources, self.destinations]).argsort()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.grid}, {self.count})"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """What ``inner`` gives for the merged tokens, for all tokens; only for self-attention without a mask."""
        assert encoder_hidden_states is None
        assert attention_mask is None
        if not self.count:  # no engine takes a tensor of no tokens
            self.grid.cells(hidden_states)
            return self.inner(attn, hidden_states, None, None, temb)
        merge, unmerge = self.matching(hidden_states)
        return unmerge(self.inner(attn, merge(hidden_states), None, None, temb))

    def matching(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """(merge, unmerge) for the tokens x [n, tokens, c]: to [n, tokens - count, c], and back."""
        self.grid.cells(x)  # refuses another grid
        sources, destinations = self.sources.to(x.device), self.destinations.to(x.device)
        unit = F.normalize(x, dim=-1)
        likeness = unit[:, sources] @ unit[:, destinations].transpose(1, 2)  # [n, sources, destinations]
        best, into = likeness.max(-1)
        order = best.argsort(dim=-1, descending=True)
        gone, left = order[:, : self.count], order[:, self.count :]  # [n, count], [n, sources - count]
        into = into.gather(1, gone)
        member = (into[:, None] == torch.arange(len(destinations), device=x.device)[:, None]).to(x.dtype)
        members = member.sum(-1, keepdim=True) + 1  # [n, destinations, 1]

        def merge(values: Tensor) -> Tensor:
            others, taken = values[:, sources], values[:, destinations]
            taken = (taken + member @ _rows(others, gone)) / members
            return torch.cat([_rows(others, left), taken], dim=1)

        def unmerge(values: Tensor) -> Tensor:
            kept, taken = values[:, : left.shape[1]], values[:, left.shape[1] :]
            sorted_sources = torch.cat([_rows(taken, into), kept], dim=1)  # in the order of likeness
            back = torch.cat([_rows(sorted_sources, order.argsort(-1)), taken], dim=1)
            return back[:, self.order.to(values.device)]

        return merge, unmerge


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` [n, k] of x [n, tokens, c]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class CoarseBlocks(nn.Module):
    """Transformer blocks on the means of cells: x + U (B(P x) - P x), P the mean over a cell, U its copies for all.

    Every token keeps what tells it from its cell, and gets what the blocks add to the cell (the sparse stage of
    SparseDiT, Chang et al. 2025, without layers of its own). Stands where the blocks were, and is called as they are.
    """

    def __init__(self, blocks: Sequence[nn.Module], grid: TokenGrid) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.grid = grid

    def extra_repr(self) -> str:
        """The grid, which no weight tells."""
        return str(self.grid)

    @property
    def norm1(self) -> nn.Module:
        """Of the first block: a DiT reads its embedding of class and time there."""
        norm = self.blocks[0].norm1
        assert isinstance(norm, nn.Module)
        return norm

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        pooled = x = self.grid.average(hidden_states)
        for block in self.blocks:
            x = block(x, *args, **kwargs)
        return x if self.grid.pool == 1 else hidden_states + self.grid.spread(x - pooled)
