"""Networks that torch cannot trace, as the same functions of the same weights on tensors.

Three families compute the places of tokens in Python, from the lengths of texts or the shapes of pictures, and one of
them takes pictures and texts as lists. Here texts are padded to one length, a mask says what counts, and places are
counted in the mask. Rotations are pairs of cosine and sine: ONNX knows no complex numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from diffpress.errors import CheckpointError, ConfigError

_QWEN_MIDDLE = 4096  # places on either side of the middle
_TOGETHER = 32  # tokens of which ZImage's pictures and texts are multiples
Rotation = tuple[Tensor, Tensor]  # cosines and sines [n, tokens, head size / 2]


def make_traceable(network: nn.Module) -> None:
    """Give a network of these families the forward below; its class keeps its name, its config and its files.

    One with settings that the forward knows nothing of stays as it is; see `check_traceable`.
    """
    kind = type(network)
    family = _FAMILIES.get(kind.__name__)
    if family is not None and kind.forward is not family.forward and not _unknown(network):
        network.__class__ = type(kind.__name__, (kind,), {"forward": family.forward, "__module__": kind.__module__})
        _tables(network)
        open_door(network, kind.__name__)


def check_traceable(network: nn.Module) -> None:
    """Raises ConfigError for a network of these families that had to keep its own forward."""
    if _unknown(network):
        raise ConfigError(
            f"export: {type(network).__name__} with {' and '.join(_unknown(network))} computes with the shapes of "
            "pictures in Python, which torch cannot trace; allowed: without"
        )


def refuse_lists(network: nn.Module) -> None:
    """Raises CheckpointError for a network that wants a list of pictures."""
    first = next(iter(inspect.signature(network.forward).parameters.values()))
    if str(first.annotation).startswith("list"):
        raise CheckpointError(
            f"{type(network).__name__} takes {first.name} as {first.annotation}; "
            "allowed: networks that take one tensor for all pictures of a batch"
        )


def _unknown(network: Any) -> list[str]:
    """Settings of ``network`` that the forward of its family knows nothing of."""
    family = _FAMILIES.get(type(network).__name__)
    return [] if family is None else [name for name in family.without if getattr(network.config, name, None)]


def _tables(network: Any) -> list[Tensor]:
    """Cosines and sines by place, for each axis [places, pairs, 2]; built anew by its class, it gets them now."""
    if "tables" not in vars(network):
        family = _FAMILIES[type(network).__name__]
        for module in network.modules():
            if isinstance(module, Attention):
                module.set_processor(family.processor())
        network.tables = [torch.view_as_real(table).clone() for table in family.tables(network)]
    return network.tables


def open_door(network: nn.Module, original: str) -> None:
    """Let what stands for a network of class ``original`` be called as that is: with lists, or places in Python."""
    if original in _DOORS:
        kind = type(network)
        network.__class__ = type(kind.__name__, (_DOORS[original], kind), {"__module__": kind.__module__})


def unread(network: nn.Module) -> tuple[str, ...]:
    """Patterns of layers that run for nobody, which no graph has: what Qwen-Image's last block makes of the text."""
    blocks = dict(getattr(network, "transformer_blocks", nn.ModuleList()).named_children())
    last = next((name for name, block in reversed(blocks.items()) if hasattr(block, "txt_mlp")), None)
    idle = () if last is None else ("attn.to_add_out", "txt_mlp")
    return tuple(f"transformer_blocks.{last}.{layer}*" for layer in idle)


def _refuse(**given: Any) -> None:
    """Raises ConfigError for what would have no effect here: stock code hands it to attention processors and LoRA."""
    for name, value in given.items():
        if value:
            raise ConfigError(f"{name} is {value}; allowed: none, for this network's own attention takes none")


class _Lists:
    """Called with lists, a network gets tensors and gives a list; called with tensors, it is as without."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (args and isinstance(args[0], list)):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return self._of_lists(*args, **kwargs)

    def _of_lists(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        cap_feats: Sequence[Tensor],
        return_dict: bool = True,
        joint_attention_kwargs: Any = None,
    ) -> Any:
        """Pictures [c, 1, h, w] and texts [tokens, d] as stock pipelines give them."""
        _refuse(joint_attention_kwargs=joint_attention_kwargs)
        longest = -(-max(map(len, cap_feats)) // _TOGETHER) * _TOGETHER
        padded = pad_sequence([*cap_feats, cap_feats[0].new_zeros(longest, cap_feats[0].shape[1])], batch_first=True)
        lengths = torch.tensor([len(text) for text in cap_feats], device=padded.device)
        mask = torch.arange(longest, device=padded.device) < lengths[:, None]
        sample = super().__call__(  # type: ignore[misc]
            hidden_states=torch.cat(list(x), dim=1).transpose(0, 1),
            timestep=t,
            encoder_hidden_states=padded[:-1],
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        pictures = list(sample.unsqueeze(2).unbind(0))
        return Transformer2DModelOutput(sample=pictures) if return_dict else (pictures,)


class _Places:
    """Called with the shapes of its pictures in patches, a network gets the row and column of every patch."""

    def __call__(
        self, *args: Any, img_shapes: Any = None, guidance: None = None, attention_kwargs: Any = None, **kwargs: Any
    ) -> Any:
        _refuse(attention_kwargs=attention_kwargs)
        if img_shapes is not None:
            ((_, height, width),) = img_shapes[0]  # one frame of one picture; the same for all of a batch
            device = kwargs["hidden_states"].device
            rows, columns = (torch.arange(-(size - size // 2), size // 2, device=device) for size in (height, width))
            kwargs["img_ids"] = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


class _Attend:
    """Attention processor, as stock ones are."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
        freqs_cis: Rotation | None = None,
    ) -> Tensor:
        """Self-attention of rotated queries and keys; ``attention_mask`` [n, tokens], bool, says what is looked at."""
        rotation = freqs_cis if image_rotary_emb is None else image_rotary_emb
        layers, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
        mixed = _mixed(_projected(hidden_states, layers, norms, attn, rotation), attention_mask)
        for layer in attn.to_out:
            mixed = layer(mixed)
        return mixed


class _AttendJointly:
    """Attention processor for text and picture with projections of their own, the text before the picture."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None,
        encoder_hidden_states_mask: Tensor,
        image_rotary_emb: tuple[Rotation, Rotation],
    ) -> tuple[Tensor, Tensor]:
        """Of pictures and of texts; the mask [n, tokens of the text], bool, says what of a text is looked at."""
        of_image, of_text = image_rotary_emb
        image = attn.to_q, attn.to_k, attn.to_v
        text = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        pictures = _projected(hidden_states, image, (attn.norm_q, attn.norm_k), attn, of_image)
        texts = _projected(encoder_hidden_states, text, (attn.norm_added_q, attn.norm_added_k), attn, of_text)
        mask = encoder_hidden_states_mask
        seen = torch.cat([mask, mask.new_ones(hidden_states.shape[:2])], dim=1)
        mixed = _mixed([torch.cat(pair, dim=1) for pair in zip(texts, pictures, strict=True)], seen)
        own, other = mixed[:, mask.shape[1] :], mixed[:, : mask.shape[1]]
        for layer in attn.to_out:
            own = layer(own)
        return own, attn.to_add_out(other)


def _projected(
    x: Tensor, layers: Sequence[nn.Module], norms: Sequence[nn.Module | None], attn: Any, rotation: Rotation | None
) -> list[Tensor]:
    """Queries, keys and values [n, tokens, heads, size], the first two normed and turned."""
    query, key, value = (layer(x) for layer in layers)
    size = query.shape[-1] // attn.heads
    parts = [part.unflatten(-1, (-1, size)) for part in (query, key, value)]
    for index, norm in enumerate(norms):
        parts[index] = parts[index] if norm is None else norm(parts[index])
        parts[index] = parts[index] if rotation is None else _turn(parts[index], rotation)
    return parts


def _mixed(parts: Sequence[Tensor], seen: Tensor | None) -> Tensor:
    """What comes of queries, keys and values, [n, tokens, channels]; ``seen`` [n, tokens]: what is looked at."""
    query, key, value = parts
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=2) for part in (key, value))
    mask = None if seen is None else seen[:, None, None]
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def _turn(x: Tensor, rotation: Rotation) -> Tensor:
    """Pairs of neighbours in the heads of x [n, tokens, heads, size] as complex numbers, times those on the circle."""
    cosine, sine = (part.unsqueeze(2) for part in rotation)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), dim=-1)
    return turned.flatten(-2).type_as(x)


def _rotation(tables: Sequence[Tensor], places: Tensor) -> Rotation:
    """Of places [n, tokens, axes] by the tables of the axes, [places, pairs, 2] each."""
    turns = [table.to(places.device)[places[..., axis]] for axis, table in enumerate(tables)]
    return torch.cat(turns, dim=-2).unbind(-1)  # type: ignore[return-value]


def _text_places(first: int, mask: Tensor) -> Tensor:
    """One after the other from ``first`` on the first axis: [n, tokens, 3]."""
    line = torch.arange(first, first + mask.shape[1], device=mask.device)
    return functional.pad(line[:, None], (0, 2)).expand(mask.shape[0], -1, -1)


def _image_places(first: Tensor, height: int, width: int) -> Tensor:
    """Beside its text, which ends before ``first`` [n], by row and column: [n, tokens, 3]."""
    rows, columns = (torch.arange(size, device=first.device) for size in (height, width))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    own = first[:, None, None].expand(-1, grid.shape[0], -1)
    return torch.cat([own, grid.expand(first.shape[0], -1, -1)], dim=-1)


def _patches(x: Tensor, patch: int) -> Tensor:
    """[n, c, h, w] as tokens [n, h w / patch², patch² c]."""
    return x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _picture(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """The tokens of ``height`` x ``width`` patches as [n, c, height patch, width patch]."""
    cells = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _lumina2(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    attention_kwargs: None = None,
    return_dict: bool = True,
) -> Any:
    """Lumina 2 with the text, as long as the longest, before the picture: hidden_states [n, c, h, w]."""
    patch, tables = self.config.patch_size, _tables(self)
    height, width = hidden_states.shape[2] // patch, hidden_states.shape[3] // patch
    time, text = self.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
    mask = encoder_attention_mask.bool()
    own = _rotation(tables, _text_places(0, mask))
    rotation = _rotation(tables, _image_places(mask.sum(dim=1), height, width))
    image = self.x_embedder(_patches(hidden_states, patch))
    for layer in self.context_refiner:
        text = layer(text, mask, own)
    for layer in self.noise_refiner:
        image = layer(image, None, rotation, time)
    both = tuple(torch.cat(pair, dim=1) for pair in zip(own, rotation, strict=True))
    seen = torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1)
    joint = torch.cat([text, image], dim=1)
    for layer in self.layers:
        joint = layer(joint, seen, both, time)
    sample = _picture(self.norm_out(joint, time)[:, text.shape[1] :], height, width, patch)
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _z_image(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    return_dict: bool = True,
) -> Any:
    """Z-Image on pictures [n, c, h, w] and texts [n, tokens, d], tokens a multiple of 32.

    A text and a picture go on to the next multiple of 32 with tokens of their own, which are looked at.
    """
    patch, tables = self.all_patch_size[0], _tables(self)
    name = f"{patch}-{self.all_f_patch_size[0]}"
    height, width = hidden_states.shape[2] // patch, hidden_states.shape[3] // patch
    time = self.t_embedder(timestep * self.t_scale).type_as(hidden_states)
    mask = encoder_attention_mask.bool()
    whole = (mask.sum(dim=1) + _TOGETHER - 1) // _TOGETHER * _TOGETHER
    seen_text = torch.arange(mask.shape[1], device=mask.device) < whole[:, None]
    own = _rotation(tables, _text_places(1, mask))
    text = torch.where(mask[..., None], self.cap_embedder(encoder_hidden_states), self.cap_pad_token)
    for layer in self.context_refiner:
        text = layer(text, seen_text, own)

    image = self.all_x_embedder[name](_patches(hidden_states, patch))
    places, count = _image_places(whole + 1, height, width), image.shape[1]
    fill = -count % _TOGETHER if isinstance(count, int) else _TOGETHER - 1  # of a free size as many as may be needed
    image = torch.cat([image, self.x_pad_token.expand(image.shape[0], fill, -1)], dim=1)
    seen = (torch.arange(count + fill, device=mask.device) < count + -count % _TOGETHER).expand(image.shape[0], -1)
    rotation = _rotation(tables, functional.pad(places, (0, 0, 0, fill)))
    for layer in self.noise_refiner:
        image = layer(image, seen, rotation, time)

    both = tuple(torch.cat(pair, dim=1) for pair in zip(rotation, own, strict=True))
    joint, seen = torch.cat([image, text], dim=1), torch.cat([seen, seen_text], dim=1)
    for layer in self.layers:
        joint = layer(joint, seen, both, time)
    sample = _picture(self.all_final_layer[name](joint, c=time)[:, :count], height, width, patch)
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _qwen_image(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    img_ids: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    """Qwen-Image on patches hidden_states [n, tokens, c], of which img_ids [tokens, 2] are rows and columns.

    Those are counted from the middle, and the text goes on from the outermost on all three axes.
    """
    assert timestep is not None
    assert img_ids is not None
    tables = _tables(self)
    count = encoder_hidden_states.shape[:2]
    mask = encoder_hidden_states_mask
    mask = torch.ones(count, dtype=torch.bool, device=img_ids.device) if mask is None else mask.bool()
    image, text = self.img_in(hidden_states), self.txt_in(self.txt_norm(encoder_hidden_states))
    time = self.time_text_embed(timestep.to(image.dtype), image)
    line = img_ids.max() + 1 + torch.arange(count[1], device=img_ids.device)
    places = functional.pad(img_ids, (1, 0)), line[:, None].expand(-1, 3)
    turns = tuple(_rotation(tables, (place + _QWEN_MIDDLE)[None]) for place in places)
    for block in self.transformer_blocks:
        text, image = block(image, text, mask, time, turns)
    sample = self.proj_out(self.norm_out(image, time))
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _qwen_tables(network: Any) -> list[Tensor]:
    rope = network.pos_embed
    whole = torch.cat([rope.neg_freqs, rope.pos_freqs])
    return list(whole.split([size // 2 for size in rope.axes_dim], dim=1))


def _z_image_tables(network: Any) -> list[Tensor]:
    rope = network.rope_embedder
    return rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, rope.theta)


class _Family(NamedTuple):
    forward: Callable[..., Any]
    tables: Callable[[Any], list[Tensor]]
    """Points on the circle by place, complex [places, pairs], for each axis."""
    processor: type
    without: tuple[str, ...] = ()
    """Settings of the network that the forward knows nothing of."""


_FAMILIES = {
    "Lumina2Transformer2DModel": _Family(_lumina2, lambda network: network.rope_embedder.freqs_cis, _Attend),
    "QwenImageTransformer2DModel": _Family(
        _qwen_image,
        _qwen_tables,
        _AttendJointly,
        without=("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"),
    ),
    "ZImageTransformer2DModel": _Family(_z_image, _z_image_tables, _Attend),
}
_DOORS: dict[str, type] = {"QwenImageTransformer2DModel": _Places, "ZImageTransformer2DModel": _Lists}
