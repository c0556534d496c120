"""Architectures of the transformers library from tiny configs with random weights: what the sweep goes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

VOCABULARY, LENGTH, WIDTH = 64, 8, 32

#: Sizes under the names that most configs of language models have.
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}


class Architecture(NamedTuple):
    """`model` and `config` are names in transformers; `inputs` makes a batch of as many samples."""

    model: str
    config: str
    sizes: dict[str, Any]
    inputs: Callable[[int], dict[str, torch.Tensor]]
    experts: bool = False


def tokens(batch: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, LENGTH))}


def masked(batch: int) -> dict[str, torch.Tensor]:
    """Tokens with padding at the end, of another length in each sample, in the first one at least one."""
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (batch, 1))
    lengths[0] = LENGTH - 1
    return {**tokens(batch), "attention_mask": (torch.arange(LENGTH) < lengths).long()}


def pair(batch: int) -> dict[str, torch.Tensor]:
    return {**tokens(batch), "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, LENGTH - 2))}


def masked_pair(batch: int) -> dict[str, torch.Tensor]:
    """Both sequences with padding."""
    decoder = {f"decoder_{key}": value for key, value in masked(batch).items()}
    return {**masked(batch), **decoder}


def images(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16)}


def large_images(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def sound(batch: int) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(batch, 400)}


def captions(batch: int) -> dict[str, torch.Tensor]:
    return {**tokens(batch), **images(batch)}


def _causal(name: str, sizes: dict[str, Any] = GROUPED, **more: Any) -> Architecture:
    return Architecture(f"{name}ForCausalLM", f"{name}Config", {**sizes, **more}, masked)


def _sparse(name: str, sizes: dict[str, Any] = GROUPED, **more: Any) -> Architecture:
    return _causal(name, sizes, **more)._replace(experts=True)


def _encoder(name: str, sizes: dict[str, Any] = TEXT, **more: Any) -> Architecture:
    return Architecture(f"{name}ForMaskedLM", f"{name}Config", {**sizes, **more}, masked)


def _vision(name: str, sizes: dict[str, Any] = IMAGE, **more: Any) -> Architecture:
    return Architecture(f"{name}ForImageClassification", f"{name}Config", {**sizes, **more}, images)


_D_MODEL = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_STAGES = {"num_channels": 3, "depths": [1, 1], "image_size": 32, "num_labels": 5}

ARCHITECTURES: dict[str, Architecture] = {
    # -- decoders ---------------------------------------------------------------------------------------------------
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": WIDTH, "n_layer": 2, "n_head": 4},
        tokens,
    ),
    "gpt_neo": _causal(
        "GPTNeo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 32,
            "window_size": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": _causal("GPTNeoX", TEXT),
    "gpt_j": _causal(
        "GPTJ",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 16,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "rotary_dim": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_bigcode": _causal(
        "GPTBigCode",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 16,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": _causal("OPT", TEXT, ffn_dim=48, word_embed_proj_dim=WIDTH, dropout=0.1),
    "bloom": _causal("Bloom", {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4}),
    "llama": _causal("Llama"),
    "mistral": _causal("Mistral", sliding_window=4),
    "mixtral": _sparse("Mixtral", num_local_experts=4, **EXPERTS),
    "qwen2": _causal("Qwen2"),
    "qwen3": _causal("Qwen3", head_dim=8),
    "qwen2_moe": _sparse(
        "Qwen2Moe", num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, **EXPERTS
    ),
    "qwen3_moe": _sparse("Qwen3Moe", num_experts=4, moe_intermediate_size=16, head_dim=8, **EXPERTS),
    "olmoe": _sparse("Olmoe", num_experts=4, **EXPERTS),
    "phi": _causal("Phi"),
    "phi3": _causal("Phi3"),
    "gemma": _causal("Gemma", head_dim=8),
    "gemma2": _causal("Gemma2", head_dim=8, sliding_window=4),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 4}, masked
    ),
    "falcon": _causal("Falcon", TEXT),
    "mpt": _causal("Mpt", {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": 2, "n_heads": 4, "max_seq_len": 16}),
    "stablelm": _causal("StableLm"),
    "starcoder2": _causal("Starcoder2"),
    "cohere": _causal("Cohere"),
    "olmo": _causal("Olmo"),
    "olmo2": _causal("Olmo2"),
    "granite": _causal("Granite"),
    "glm": _causal("Glm", head_dim=8),
    "nemotron": _causal("Nemotron"),
    "persimmon": _causal("Persimmon", TEXT),
    "smollm3": _causal("SmolLM3"),
    "codegen": _causal(
        "CodeGen",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 16,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "rotary_dim": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "mamba": _causal(
        "Mamba", {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4}
    ),
    "rwkv": _causal(
        "Rwkv", {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "attention_hidden_size": WIDTH}
    ),
    "xglm": _causal(
        "XGLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 32,
        },
    ),
    # -- encoders ---------------------------------------------------------------------------------------------------
    "bert": _encoder("Bert"),
    "roberta": _encoder("Roberta"),
    "xlm_roberta": _encoder("XLMRoberta"),
    "electra": _encoder("Electra", embedding_size=WIDTH),
    "albert": _encoder("Albert", embedding_size=16),
    "distilbert": _encoder(
        "DistilBert",
        {
            "vocab_size": VOCABULARY,
            "dim": WIDTH,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 32,
        },
    ),
    "deberta_v2": _encoder("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4),
    "mpnet": _encoder("MPNet"),
    "roformer": _encoder("RoFormer", embedding_size=WIDTH),
    "convbert": _encoder("ConvBert", embedding_size=WIDTH),
    "fnet": Architecture("FNetForMaskedLM", "FNetConfig", TEXT, tokens),
    "modernbert": _encoder("ModernBert", sep_token_id=2, cls_token_id=1),
    "megatron_bert": _encoder("MegatronBert"),
    "squeezebert": _encoder("SqueezeBert", embedding_size=WIDTH),
    # -- encoders with decoders -------------------------------------------------------------------------------------
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", _T5, pair),
    "mt5": Architecture("MT5ForConditionalGeneration", "MT5Config", _T5, pair),
    "bart": Architecture("BartForConditionalGeneration", "BartConfig", _D_MODEL, pair),
    "mbart": Architecture("MBartForConditionalGeneration", "MBartConfig", _D_MODEL, pair),
    "pegasus": Architecture("PegasusForConditionalGeneration", "PegasusConfig", _D_MODEL, pair),
    "marian": Architecture("MarianMTModel", "MarianConfig", _D_MODEL, pair),
    "blenderbot": Architecture("BlenderbotForConditionalGeneration", "BlenderbotConfig", _D_MODEL, pair),
    "m2m_100": Architecture("M2M100ForConditionalGeneration", "M2M100Config", _D_MODEL, pair),
    # -- images -----------------------------------------------------------------------------------------------------
    "vit": _vision("ViT"),
    "deit": _vision("DeiT"),
    "beit": _vision("Beit"),
    "dinov2": _vision("Dinov2"),
    "swin": Architecture(
        "SwinForImageClassification",
        "SwinConfig",
        {**_STAGES, "embed_dim": 16, "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
        large_images,
    ),
    "convnext": Architecture(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {**_STAGES, "hidden_sizes": [8, 16], "num_stages": 2},
        large_images,
    ),
    "resnet": Architecture(
        "ResNetForImageClassification",
        "ResNetConfig",
        {**_STAGES, "embedding_size": 8, "hidden_sizes": [8, 16]},
        large_images,
    ),
    "mobilenet_v2": Architecture(
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"image_size": 32, "depth_multiplier": 0.25},
        large_images,
    ),
    "segformer": Architecture(
        "SegformerForImageClassification",
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        large_images,
    ),
    "clip": Architecture(
        "CLIPModel",
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16},
        captions,
    ),
    # -- sound ------------------------------------------------------------------------------------------------------
    "wav2vec2": Architecture(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **TEXT,
            "conv_dim": [16, 16],
            "conv_stride": [4, 2],
            "conv_kernel": [8, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            "mask_time_prob": 0.0,
            "layerdrop": 0.0,
        },
        sound,
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_D_MODEL, "num_mel_bins": 16, "max_source_positions": 8, "max_target_positions": 16},
        lambda batch: {
            "input_features": torch.randn(batch, 16, 16),
            "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, 6)),
        },
    ),
}


def build(name: str) -> torch.nn.Module:
    """The model of this name, in training mode, without dropout and without a cache of keys and values."""
    import transformers

    one = ARCHITECTURES[name]
    config = getattr(transformers, one.config)(**one.sizes)
    for part in (config, *(getattr(config, key) for key in config.sub_configs)):
        for key, value in part.to_dict().items():
            if isinstance(value, float) and ("drop" in key or "pdrop" in key):
                setattr(part, key, 0.0)
        if hasattr(part, "use_cache"):
            part.use_cache = False
    torch.manual_seed(0)
    model = getattr(transformers, one.model)(config)
    if one.experts:
        model.set_experts_implementation("batched_mm")
    return model.train()
