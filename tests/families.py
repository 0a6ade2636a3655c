"""Tiny random pipelines of the families that people have, of stock classes alone, each with what is special in it."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny import (
    fill_zeros,
    make_autoencoder,
    make_flux,
    make_scheduler,
    make_t5_encoder,
    make_t5_tokenizer,
    make_text_encoder,
    make_tokenizer,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

UNSHIFTED = {"use_quant_conv": False, "use_post_quant_conv": False}
DECODER_ONLY = {
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def byte_tokenizer(padding="right"):
    """For the language models: one token for each byte, a first one before them, a template for chats."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", *letters])}
    core = Tokenizer(models.BPE(vocab=words, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side=padding, model_max_length=512
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


_embeds = Flux2KleinPipeline._get_qwen3_prompt_embeds


def first_layers(*args, **kwargs):
    """Klein reads the hidden layers 9, 18 and 27; as many take minutes to trace."""
    return _embeds(*args, **(kwargs | {"hidden_states_layers": (0, 1, 2)}))


def sdxl():
    """Two text encoders, sizes as a condition, nested arguments."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    tokenizer = make_tokenizer()
    return StableDiffusionXLPipeline(
        vae=fill_zeros(make_autoencoder()),
        text_encoder=fill_zeros(make_text_encoder(tokenizer)),
        text_encoder_2=fill_zeros(make_text_encoder(tokenizer, CLIPTextModelWithProjection)),
        tokenizer=tokenizer,
        tokenizer_2=make_tokenizer(),
        unet=fill_zeros(unet),
        scheduler=EulerDiscreteScheduler(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def pixart():
    """T5 with a mask, variance beside the noise, adaLN shared by the blocks."""
    tokenizer = make_t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=16,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=fill_zeros(make_t5_encoder(tokenizer)),
        vae=fill_zeros(make_autoencoder()),
        transformer=fill_zeros(transformer),
        scheduler=make_scheduler(),
    )


def sd3():
    """Three text encoders, picture and text tokens in joint attention; a second attention in the first block (3.5)."""
    tokenizer, pieces = make_tokenizer(), make_t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    settings = make_t5_encoder(pieces).config
    settings.d_model = 32
    return StableDiffusion3Pipeline(
        transformer=fill_zeros(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=fill_zeros(make_autoencoder(shift_factor=0.06, **UNSHIFTED)),
        text_encoder=fill_zeros(make_text_encoder(tokenizer, CLIPTextModelWithProjection)),
        tokenizer=tokenizer,
        text_encoder_2=fill_zeros(make_text_encoder(tokenizer, CLIPTextModelWithProjection)),
        tokenizer_2=make_tokenizer(),
        text_encoder_3=fill_zeros(T5EncoderModel(settings)),
        tokenizer_3=pieces,
    )


def auraflow():
    """Joint attention, learned positions of which the middle is taken, one scale for both halves of guidance."""
    tokenizer = make_t5_tokenizer()
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    encoder = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=fill_zeros(UMT5EncoderModel(encoder)),
        vae=fill_zeros(make_autoencoder()),
        transformer=fill_zeros(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def sana():
    """Linear attention with its 1e-15, convolutions in the MLP, an autoencoder that is not variational, Gemma.

    Prompt and negative prompt go through the text encoder at different lengths. Sizes are multiples of 32.
    """
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
    )
    autoencoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_conv_act_fn="silu",
        scaling_factor=0.4,
    )
    return SanaPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=fill_zeros(Gemma2Model(Gemma2Config(**DECODER_ONLY, bos_token_id=1))),
        vae=fill_zeros(autoencoder),
        transformer=fill_zeros(transformer),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def hunyuan():
    """BERT and T5, an attention pool, U-shaped skips in a transformer; its pipeline reads widths off the network."""
    letters = [chr(code) for code in range(97, 123)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary, pieces = {word: index for index, word in enumerate(words)}, make_t5_tokenizer()
    encoder = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        mlp_ratio=2.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
    )
    return HunyuanDiTPipeline(
        vae=fill_zeros(make_autoencoder(levels=4)),  # the pipeline takes 8 pixels for granted
        text_encoder=fill_zeros(BertModel(encoder)),
        tokenizer=BertTokenizer(vocab=vocabulary, model_max_length=77),
        transformer=fill_zeros(transformer),
        scheduler=DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=fill_zeros(make_t5_encoder(pieces)),
        tokenizer_2=pieces,
    )


def cogview4():
    """A language model as text encoder whose texts are as long as they are; two calls for the branches of guidance."""
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=8,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    return CogView4Pipeline(
        tokenizer=byte_tokenizer("left"),
        text_encoder=fill_zeros(GlmModel(GlmConfig(**DECODER_ONLY))),
        vae=fill_zeros(make_autoencoder()),
        transformer=fill_zeros(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
    )


def flux2():
    """Modulations shared by all blocks, three hidden layers of a language model joined into one text; statistics of the
    autoencoder that the pipeline reads itself.
    """
    Flux2KleinPipeline._get_qwen3_prompt_embeds = staticmethod(first_layers)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
    )
    autoencoder.bn.running_mean.uniform_(-1, 1)
    autoencoder.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=fill_zeros(autoencoder),
        text_encoder=fill_zeros(Qwen3ForCausalLM(Qwen3Config(**DECODER_ONLY))),
        tokenizer=byte_tokenizer(),
        transformer=fill_zeros(transformer),
    )


def chroma():
    """Flux without CLIP, a mask over joint tokens, and a batch that its own code makes a constant."""
    tokenizer = make_t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=fill_zeros(make_autoencoder(shift_factor=0.06, **UNSHIFTED)),
        text_encoder=fill_zeros(make_t5_encoder(tokenizer)),
        tokenizer=tokenizer,
        transformer=fill_zeros(transformer),
    )


def lumina2():
    """Grouped queries; positions from the lengths of the texts, which stock code computes in Python."""
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(512, 64, 64),
        cap_feat_dim=16,
    )
    return Lumina2Pipeline(
        transformer=fill_zeros(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=fill_zeros(make_autoencoder(levels=4, shift_factor=0.06, **UNSHIFTED)),  # the pipeline takes 8 for granted
        text_encoder=fill_zeros(Gemma2Model(Gemma2Config(**DECODER_ONLY, bos_token_id=1))),
        tokenizer=byte_tokenizer(),
    )


def zimage():
    """Pictures and texts as lists, each filled up to a multiple of 32 tokens."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[512, 64, 64],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=fill_zeros(make_autoencoder(shift_factor=0.06, **UNSHIFTED)),
        text_encoder=fill_zeros(Qwen3Model(Qwen3Config(**DECODER_ONLY))),
        tokenizer=byte_tokenizer(),
        transformer=fill_zeros(transformer),
    )


def qwen():
    """Guidance beside a negative prompt, places by the shapes of pictures; an encoder that sees, a decoder of video."""
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, num_res_blocks=1, dim_mult=[1, 1, 1, 1], latents_mean=[0.1] * 4, latents_std=[0.9] * 4
    )
    rotation = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = {key: value for key, value in DECODER_ONLY.items() if key != "head_dim"} | {"rope_parameters": rotation}
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    tokens = ("vision_start", "vision_end", "vision", "image", "video")
    own = {f"{name}_token_id": 250 + index for index, name in enumerate(tokens)}
    encoder = Qwen2_5_VLConfig(text_config=text, vision_config=sight, **own)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=fill_zeros(autoencoder),
        text_encoder=fill_zeros(Qwen2_5_VLForConditionalGeneration(encoder)),
        tokenizer=byte_tokenizer(),
        transformer=fill_zeros(transformer),
    )


_DEEPER = {
    "num_layers": 4,
    "num_mmdit_layers": 2,
    "num_single_dit_layers": 3,
    "num_single_layers": 3,
    "n_layers": 4,
}
FAMILIES = {
    "sdxl": sdxl,
    "pixart": pixart,
    "sd3": sd3,
    "flux": make_flux,
    "flux2": flux2,
    "chroma": chroma,
    "auraflow": auraflow,
    "sana": sana,
    "hunyuan": hunyuan,
    "cogview4": cogview4,
    "lumina2": lumina2,
    "zimage": zimage,
    "qwen": qwen,
}


def deeper(name):
    """The family's pipeline with several blocks of each kind, as the real ones have."""
    pipeline = make(name)
    config = pipeline.transformer.config
    counts = {entry: count for entry, count in _DEEPER.items() if entry in config}
    pipeline.transformer = fill_zeros(type(pipeline.transformer).from_config({**config, **counts}))
    return pipeline


def make(name):
    """The same weights every time."""
    torch.manual_seed(3)
    return FAMILIES[name]()
