"""The smallest random networks and tokenizers that stock pipelines are made of, and one whole pipeline."""

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


@torch.no_grad()
def fill_zeros(module, std=0.1):
    """Nothing stays at its zero initialization (adaLN, last layers, biases): every path then carries signal."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=std)
    return module.eval()


def make_autoencoder(**changes):
    levels = changes.pop("levels", 2)  # a latent is 2^(levels - 1) pixels wide
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=16,
        **changes,
    )


def make_scheduler():
    return DPMSolverMultistepScheduler(prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1)


def make_tokenizer():
    """CLIP's layout without merges: one token for each byte."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=12)


def make_text_encoder(tokenizer, kind=CLIPTextModel, **changes):
    """CLIP's, or with ``kind`` CLIPTextModelWithProjection the one with a projection."""
    settings = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    settings.update(changes)
    return kind(settings)


def make_t5_tokenizer():
    """T5's layout: one token for each letter."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(chr(code) for code in range(33, 127))]
    return T5Tokenizer(vocab=[(piece, -float(min(index, 4))) for index, piece in enumerate(pieces)], extra_ids=0)


def make_t5_encoder(tokenizer):
    settings = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(settings)


def make_flux():
    """CLIP and T5, packed latents, rotary positions, guidance as an input, flow."""
    tokenizer, pieces = make_tokenizer(), make_t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        transformer=fill_zeros(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=fill_zeros(make_autoencoder(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)),
        text_encoder=fill_zeros(make_text_encoder(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=fill_zeros(make_t5_encoder(pieces)),
        tokenizer_2=pieces,
    )
