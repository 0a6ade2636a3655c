"""Engines dressed as the modules they replace, so that stock diffusers pipelines run them unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution, EncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput, Transformer2DModelOutput
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from diffpress.caching import CachePolicy, Caches
from diffpress.errors import EngineError
from diffpress.export.components import flatten_inputs, with_masks
from diffpress.export.fold import TIMESTEP
from diffpress.export.session import Session


def run_session(session: Session, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs by name. Raises EngineError when an input is not among the arguments."""
    given = flatten_inputs({name: value for name, value in arguments.items() if value is not None})
    given = with_masks(given, session.inputs)
    missing = [name for name in session.inputs if name not in given]
    if missing:
        raise EngineError(f"the engine needs {', '.join(missing)}; the pipeline gave {', '.join(given)}")
    return dict(zip(session.outputs, session(given), strict=True))


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's operations inside use one thread: its others would go on spinning for a while, and the run-time, whose
    threads are others, wants the cores right after.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def refuse_copies(self: Any, protocol: Any) -> NoReturn:
    """An open engine stays in its process. Raises EngineError."""
    raise EngineError(
        f"{type(self).__name__} runs an open engine, which cannot be pickled or copied; allowed: diffpress.load of its "
        "folder in each process"
    )


class EngineModule(nn.Module):
    """What all stand-ins share: the config of what they replace, and where pipelines look for device and dtype."""

    def __init__(self, session: Session, config: dict[str, Any]) -> None:
        super().__init__()
        self.session = session
        self.config = FrozenDict(config)

    __reduce_ex__ = refuse_copies

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.session.device

    def run(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """Call the engine with the arguments it has inputs for. Raises EngineError when one of them is missing."""
        return run_session(self.session, arguments)


class EngineDenoiser(EngineModule):
    """A transformer or U-Net. ``parameters`` are the argument names of the original's forward, in order.

    ``timesteps`` are all that the engine knows, ``taken`` the arguments that it was made with; None for any.
    """

    timesteps: tuple[float, ...] | None = None
    taken: frozenset[str] | None = None

    def __init__(self, session: Session, config: dict[str, Any], parameters: list[str]) -> None:
        super().__init__(session, config)
        self.argument_names = parameters
        time_ids = config.get(
            "projection_class_embeddings_input_dim"
        )  # pipelines of the SDXL family read it off a layer
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=time_ids))

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        arguments = dict(zip(self.argument_names, args, strict=False)) | kwargs
        if self.timesteps is not None:
            check_timesteps(arguments[TIMESTEP], self.timesteps)
        if self.taken is not None and (unknown := sorted(_unknown(arguments, self.taken))):
            raise EngineError(
                f"the engine was made without {', '.join(unknown)}, which the pipeline gave; allowed: pipelines and "
                "settings that call the denoiser as in the export"
            )
        sample = self.run(arguments)["out_sample"]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Pipelines of the Flux family mark their guidance branches with it."""
        yield


def _unknown(arguments: dict[str, Any], taken: frozenset[str]) -> Iterator[str]:
    """Arguments, or entries of dictionaries, that say something and are none of ``taken``."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and not value:
            continue  # None, false or empty
        if name not in taken:
            yield name
        elif isinstance(value, dict):
            yield from (key for key, entry in value.items() if entry is not None and key not in taken)


def check_timesteps(told: Tensor | float, known: tuple[float, ...]) -> None:
    """Raises EngineError for a timestep that is none of ``known``, by more than a hundredth of their least distance."""
    values = set(told.flatten().tolist() if isinstance(told, Tensor) else (told,))
    for value in values.difference(known):  # numbers of Python: this is done in every step, where tensors are slow
        if min(abs(value - step) for step in known) > _least_gap(known) / 100:
            raise EngineError(
                f"the engine was exported for timesteps {', '.join(f'{step:g}' for step in known)} and called with "
                f"{value:g}; allowed: the sampling plan of its recipe, or an export with timesteps: any"
            )


def _least_gap(known: tuple[float, ...]) -> float:
    return min((abs(a - b) for a, b in pairwise(sorted(known))), default=abs(known[0]))


class CachedEngineDenoiser(EngineDenoiser):
    """A denoiser cut in pieces (see `cut`), which reuses from step to step what its policy says.

    What is kept stays where the run-time's outputs are.
    """

    def __init__(
        self, pieces: dict[str, Session], config: dict[str, Any], parameters: list[str], policy: CachePolicy
    ) -> None:
        super().__init__(next(iter(pieces.values())), config, parameters)
        self.pieces, self.caches = pieces, Caches(policy, parameters)

    def run(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        given = {name: value for name, value in arguments.items() if value is not None}
        decision, state = self.caches.decide(given), self.caches.state
        residual = None
        if self.caches.policy.kind == "threshold":
            start = run_session(self.pieces["first"], given)
            residual = start.pop("residual")
            given |= start
            if decision == "test":
                with one_thread():
                    decision = "reuse" if state.passes(residual) else "compute"
        full, short = ("rest", "last") if self.caches.policy.kind == "threshold" else ("full", "reuse")
        if decision == "reuse":
            with one_thread():
                kept = {f"cache.{i}": tensor for i, tensor in zip(self._numbers(full), state.predict(), strict=True)}
            return run_session(self.pieces[short], given | kept)
        outputs = run_session(self.pieces[full], given)
        with one_thread():
            state.store(tuple(outputs[f"cache.{i}"] for i in self._numbers(full)), residual)
        return outputs

    def _numbers(self, full: str) -> list[str]:
        """Of the tensors that are kept."""
        return [name.removeprefix("cache.") for name in self.pieces[full].outputs if name.startswith("cache.")]

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Each guidance branch has a cache of its own."""
        with self.caches.context(name):
            yield


class EngineTextEncoder(EngineModule):
    """A CLIP or T5 text encoder."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        outputs = self.run({"input_ids": input_ids, "attention_mask": attention_mask})
        hidden = tuple(value for name, value in outputs.items() if name.startswith("hidden_states."))
        if output_hidden_states and not hidden:
            raise EngineError(
                "the engine of the text encoder was made without hidden states, which the pipeline asked for; allowed: "
                "calls without clip_skip"
            )
        plain = {name: value for name, value in outputs.items() if not name.startswith("hidden_states.")}
        result = BaseModelOutputWithPooling(
            last_hidden_state=plain.pop("last_hidden_state", None),
            pooler_output=plain.pop("pooler_output", None),
            hidden_states=hidden or None,
        )
        for name, value in plain.items():  # text_embeds of encoders with a projection, which pipelines read first
            result[name] = value
            result.move_to_end(name, last=False)
        return result


class EngineAutoencoder(nn.Module):
    """The decoder and, where it was exported, the encoder of an autoencoder; its ``buffers`` by their dotted names."""

    def __init__(
        self, decoder: Session, encoder: Session | None, config: dict[str, Any], buffers: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.decoder_engine = EngineModule(decoder, config)
        self.encoder_engine = None if encoder is None else EngineModule(encoder, config)
        self.config = self.decoder_engine.config
        for name, value in config.items():  # that pipelines read off the autoencoder itself
            if not name.startswith("_") and not hasattr(self, name):
                setattr(self, name, value)
        for name, buffer in buffers.items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for step in path:
                if not hasattr(owner, step):
                    owner.add_module(step, nn.Module())
                owner = getattr(owner, step)
            owner.register_buffer(last, buffer)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder_engine.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder_engine.device

    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> Any:
        sample = self.decoder_engine.run({next(iter(self.decoder_engine.session.inputs)): z})["sample"]
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        if self.encoder_engine is None:
            raise EngineError("this engine has no vae_encoder: its pipeline cannot start from a picture")
        found = self.encoder_engine.run({"sample": x})
        if "latents" in found:
            return AutoencoderTinyOutput(latents=found["latents"]) if return_dict else (found["latents"],)
        if "latent" in found:
            return EncoderOutput(latent=found["latent"]) if return_dict else (found["latent"],)
        posterior = DiagonalGaussianDistribution(found["latent_parameters"])
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)
