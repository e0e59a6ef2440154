"""Tiny random models of many architectures, built offline from transformers' configurations, with inputs and dynamic
dimensions.

`ARCHITECTURES[name].build()` gives the arguments of capture: a model in eval mode with seeded random weights, example
inputs by name, and what may vary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from tests.architecture_inputs import (
    batch_inputs,
    causal_inputs,
    clip_inputs,
    image_inputs,
    pair_inputs,
    plain_inputs,
    spectrogram_inputs,
    speech_inputs,
    text_inputs,
    wave_inputs,
    whisper_inputs,
)

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class Built:
    """What `capture` takes."""

    model: nn.Module
    inputs: Mapping[str, Any]
    dynamic: Mapping[str, Mapping[int, str]]

    def enlivened(self) -> "Built":
        """The same with larger matrices: transformers' own are so small that most layers hardly change what passes
        them, and a mistake in one would not show in the outputs.
        """
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim > 1 and bool(parameter.std() > 0):
                    inner = parameter.shape[1] if parameter.ndim == 3 else parameter[0].numel()
                    parameter.mul_(inner**-0.5 / parameter.std())
        return self

    def resized(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The inputs with dynamic dimensions of other sizes, by name: cut, or repeated; masks stay left-aligned."""
        inputs = dict(self.inputs)
        for name, axes in self.dynamic.items():
            for axis, dimension in axes.items():
                old = inputs[name].shape[axis]
                inputs[name] = inputs[name].index_select(axis, torch.arange(sizes.get(dimension, old)) % old)
            if name.endswith("mask"):
                inputs[name] = inputs[name].sort(dim=-1, descending=True).values
        return inputs


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Args:
        kind: encoder, decoder, experts, encoder-decoder, vision, speech or multimodal.
        model_type: transformers' name of the configuration.
        auto: the class that makes a model from it.
        inputs: a function from the configuration to example inputs and dynamic dimensions.
        options: sizes of the configuration.
    """

    kind: str
    model_type: str
    auto: str
    inputs: Callable[[Any], tuple[dict[str, Any], dict[str, dict[int, str]]]]
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, attention: str | None = None) -> Built:
        """A model with seeded random weights.

        Args:
            attention: `eager` or `sdpa`; the model's default when it supports no other.
        """
        config = transformers.AutoConfig.for_model(self.model_type, **self.options)
        if attention is not None:
            config._attn_implementation = attention
        torch.manual_seed(0)
        model = getattr(transformers, self.auto).from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases of zero and gains of one would hide mistakes
                with torch.no_grad():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        inputs, dynamic = self.inputs(config)
        return Built(model, inputs, dynamic)


def encoder(model_type: str, **options: Any) -> Architecture:
    """An encoder of texts."""
    return Architecture("encoder", model_type, "AutoModel", text_inputs, {**TEXT, **options})


def decoder(model_type: str, kind: str = "decoder", **options: Any) -> Architecture:
    """A language model without a cache."""
    return Architecture(kind, model_type, "AutoModelForCausalLM", causal_inputs, {**TEXT, **options})


def experts(model_type: str, **options: Any) -> Architecture:
    """A language model with mixtures of experts."""
    sizes = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **GROUPED}
    return decoder(model_type, "experts", **{**sizes, **options})


def encoder_decoder(model_type: str, **options: Any) -> Architecture:
    """An encoder and a decoder."""
    sizes = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }
    return Architecture("encoder-decoder", model_type, "AutoModelForSeq2SeqLM", pair_inputs, {**sizes, **options})


def _t5(model_type: str, **options: Any) -> Architecture:
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 96,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    }
    return Architecture("encoder-decoder", model_type, "AutoModelForSeq2SeqLM", pair_inputs, {**sizes, **options})


def vision(model_type: str, **options: Any) -> Architecture:
    """A model of images."""
    return Architecture("vision", model_type, "AutoModel", image_inputs, options)


def wave(model_type: str, **options: Any) -> Architecture:
    """A model of sound waves."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "conv_dim": (16, 16, 16),
        "conv_kernel": (10, 3, 3),
        "conv_stride": (5, 2, 2),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "vocab_size": 32,
    }
    return Architecture("speech", model_type, "AutoModel", wave_inputs, {**sizes, **options})


ARCHITECTURES: dict[str, Architecture] = {
    # encoders
    "bert": encoder("bert"),
    "roberta": encoder("roberta", pad_token_id=1),
    "distilbert": encoder("distilbert", dim=32, hidden_dim=64, n_layers=2, n_heads=4),
    "albert": encoder("albert", embedding_size=16),
    "electra": encoder("electra", embedding_size=16),
    "deberta-v2": encoder("deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "mpnet": encoder("mpnet"),
    "convbert": encoder("convbert", embedding_size=32),
    "squeezebert": encoder(
        "squeezebert",
        embedding_size=32,
        q_groups=2,
        k_groups=2,
        v_groups=2,
        post_attention_groups=1,
        intermediate_groups=2,
        output_groups=2,
    ),
    "roformer": encoder("roformer", embedding_size=32),
    "modernbert": encoder("modernbert", local_attention=8, global_attn_every_n_layers=2),
    "esm": encoder("esm", position_embedding_type="rotary", mask_token_id=4),
    "fnet": Architecture("encoder", "fnet", "AutoModel", plain_inputs, TEXT),
    "mobilebert": encoder(
        "mobilebert", embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32, num_feedforward_networks=2
    ),
    # decoders
    "gpt2": decoder("gpt2"),
    "gpt_neo": decoder("gpt_neo", attention_types=[[["global", "local"], 1]], num_layers=2, window_size=4),
    "gptj": decoder("gptj", rotary_dim=4),
    "gpt_neox": decoder("gpt_neox"),
    "codegen": decoder("codegen", rotary_dim=4, n_embd=32, n_head=4, n_layer=2),
    "opt": decoder("opt", ffn_dim=64, word_embed_proj_dim=32),
    "bloom": decoder("bloom"),
    "mpt": decoder("mpt", d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=64),
    "falcon": decoder("falcon"),
    "llama": decoder("llama", **GROUPED),
    "mistral": decoder("mistral", sliding_window=4, **GROUPED),
    "qwen2": decoder("qwen2", **GROUPED),
    "qwen3": decoder("qwen3", **GROUPED),
    "gemma": decoder("gemma", **GROUPED),
    "gemma2": decoder("gemma2", sliding_window=4, **GROUPED),
    "gemma3_text": decoder("gemma3_text", sliding_window=4, **GROUPED),
    "phi": decoder("phi"),
    "phi3": decoder("phi3", num_key_value_heads=2),
    "starcoder2": decoder("starcoder2", **GROUPED),
    "stablelm": decoder("stablelm", num_key_value_heads=2),
    "cohere": decoder("cohere", **GROUPED),
    "olmo2": decoder("olmo2", num_key_value_heads=2),
    "granite": decoder("granite", **GROUPED),
    "smollm3": decoder("smollm3", num_key_value_heads=2),
    "glm": decoder("glm", **GROUPED),
    "mamba": Architecture(
        "decoder",
        "mamba",
        "AutoModelForCausalLM",
        batch_inputs,
        {**TEXT, "state_size": 4, "expand": 2, "time_step_rank": 4},
    ),
    # mixtures of experts
    "mixtral": experts("mixtral"),
    "qwen2_moe": experts("qwen2_moe", shared_expert_intermediate_size=16),
    "qwen3_moe": experts("qwen3_moe"),
    "olmoe": experts("olmoe"),
    "granitemoe": experts("granitemoe"),
    "gpt_oss": experts("gpt_oss", sliding_window=4),
    # encoder-decoders
    "t5": _t5("t5"),
    "umt5": _t5("umt5"),
    "bart": encoder_decoder("bart"),
    "mbart": encoder_decoder("mbart"),
    "pegasus": encoder_decoder("pegasus"),
    "marian": encoder_decoder("marian", decoder_vocab_size=96),
    "m2m_100": encoder_decoder("m2m_100"),
    "blenderbot": encoder_decoder("blenderbot"),
    "whisper": Architecture(
        "speech",
        "whisper",
        "AutoModel",
        whisper_inputs,
        {
            **encoder_decoder("bart").options,
            "num_mel_bins": 16,
            "max_source_positions": 12,
            "max_target_positions": 16,
            "suppress_tokens": None,
        },
    ),
    "speech_to_text": Architecture(
        "speech",
        "speech_to_text",
        "AutoModel",
        speech_inputs,
        {
            **encoder_decoder("bart").options,
            "max_source_positions": 40,
            "max_target_positions": 16,
            "input_feat_per_channel": 16,
            "conv_channels": 32,
        },
    ),
    # vision
    "vit": vision("vit", **VISION),
    "deit": vision("deit", **VISION),
    "beit": vision("beit", **VISION),
    "dinov2": vision("dinov2", **VISION),
    "swin": vision("swin", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
    "swinv2": vision(
        "swinv2", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    "convnext": vision("convnext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32),
    "convnextv2": vision("convnextv2", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32),
    "resnet": vision("resnet", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck"),
    "regnet": vision("regnet", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8),
    "mobilenet_v2": vision("mobilenet_v2", depth_multiplier=0.35, image_size=32),
    "efficientnet": vision(
        "efficientnet", width_coefficient=0.25, depth_coefficient=0.25, image_size=32, hidden_dim=320
    ),
    "segformer": vision(
        "segformer",
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[8, 16],
        num_attention_heads=[1, 2],
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        image_size=32,
    ),
    "poolformer": vision(
        "poolformer",
        depths=[1, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
        num_encoder_blocks=2,
    ),
    "mobilevit": vision(
        "mobilevit", image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32]
    ),
    # speech
    "wav2vec2": wave("wav2vec2"),
    "hubert": wave("hubert"),
    "wavlm": wave("wavlm", num_buckets=16, max_bucket_distance=32),
    "audio-spectrogram-transformer": Architecture(
        "speech",
        "audio-spectrogram-transformer",
        "AutoModel",
        spectrogram_inputs,
        {
            **{
                key: VISION[key]
                for key in (
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "patch_size",
                )
            },
            "max_length": 32,
            "num_mel_bins": 16,
            "frequency_stride": 8,
            "time_stride": 8,
        },
    ),
    # two towers
    "clip": Architecture(
        "multimodal",
        "clip",
        "AutoModel",
        clip_inputs,
        {
            "text_config": {**TEXT, "projection_dim": 16},
            "vision_config": {**VISION, "projection_dim": 16},
            "projection_dim": 16,
        },
    ),
    "siglip": Architecture(
        "multimodal",
        "siglip",
        "AutoModel",
        clip_inputs,
        {"text_config": {**TEXT, "projection_size": 32}, "vision_config": VISION},
    ),
}
