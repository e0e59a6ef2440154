"""More tiny random models, for the sweep of compilations only: other kinds of attention, recurrences, mixtures of
experts, video, time series, and those that are refused.
"""

from typing import Any

from tests.architecture_inputs import (
    batch_inputs,
    causal_inputs,
    character_inputs,
    clip_inputs,
    moonshine_inputs,
    plain_inputs,
    series_inputs,
    sound_inputs,
    video_inputs,
    vilt_inputs,
)
from tests.architectures import (
    GROUPED,
    TEXT,
    VISION,
    Architecture,
    decoder,
    encoder,
    encoder_decoder,
    experts,
    vision,
    wave,
)

SMALL = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 96}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "topk_group": 1,
}
FRAMES: dict[str, Any] = {**VISION, "num_frames": 4}


def _causal(model_type: str, inputs: Any, **options: Any) -> Architecture:
    return Architecture("decoder", model_type, "AutoModelForCausalLM", inputs, options)


def _auto(kind: str, model_type: str, inputs: Any, **options: Any) -> Architecture:
    return Architecture(kind, model_type, "AutoModel", inputs, options)


MORE: dict[str, Architecture] = {
    # encoders
    "deberta": encoder("deberta", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "xlnet": _auto("encoder", "xlnet", plain_inputs, **SMALL),
    "longformer": encoder("longformer", attention_window=4, pad_token_id=1),
    "reformer": _auto(
        "encoder",
        "reformer",
        character_inputs,
        attention_head_size=8,
        hidden_size=32,
        num_attention_heads=4,
        feed_forward_size=64,
        attn_layers=["local", "lsh"],
        axial_pos_shape=[4, 4],
        axial_pos_embds_dim=[16, 16],
        vocab_size=96,
        local_attn_chunk_length=4,
        lsh_attn_chunk_length=4,
        num_buckets=2,
        max_position_embeddings=16,
    ),
    "canine": _auto(
        "encoder",
        "canine",
        character_inputs,
        **TEXT,
        local_transformer_stride=8,
        downsampling_rate=4,
        num_hash_functions=2,
        num_hash_buckets=64,
    ),
    "nystromformer": encoder("nystromformer", num_landmarks=7, segment_means_seq_len=7),
    "xlm": _auto(
        "encoder", "xlm", plain_inputs, emb_dim=32, n_layers=2, n_heads=4, n_words=96, max_position_embeddings=64
    ),
    # decoders
    "ctrl": decoder("ctrl", n_embd=32, n_layer=2, n_head=4, dff=64, n_positions=64),
    "mamba2": _causal(
        "mamba2",
        batch_inputs,
        **TEXT,
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        expand=2,
        chunk_size=8,
    ),
    "rwkv": _causal(
        "rwkv",
        batch_inputs,
        vocab_size=96,
        hidden_size=32,
        attention_hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        context_length=32,
    ),
    "lfm2": decoder("lfm2", num_key_value_heads=2, layer_types=["conv", "full_attention"], block_multiple_of=16),
    "recurrent_gemma": decoder(
        "recurrent_gemma",
        lru_width=32,
        attention_window_size=8,
        num_key_value_heads=1,
        block_types=["recurrent", "attention"],
    ),
    "gemma3n_text": decoder(
        "gemma3n_text",
        **GROUPED,
        sliding_window=4,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=96,
        laurel_rank=8,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.5, 0.0],
        layer_types=["sliding_attention", "full_attention"],
    ),
    # mixtures of experts
    "deepseek_v2": experts("deepseek_v2", **LATENT, q_lora_rank=None, topk_method="greedy", n_group=1),
    "deepseek_v3": experts("deepseek_v3", **LATENT, q_lora_rank=16, n_group=2),
    "llama4_text": experts("llama4_text", intermediate_size_mlp=64, num_experts_per_tok=1, attention_chunk_size=8),
    "glm4_moe": experts(
        "glm4_moe", n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1
    ),
    "jamba": decoder(
        "jamba",
        "experts",
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
    ),
    "dbrx": Architecture(
        "experts",
        "dbrx",
        "AutoModelForCausalLM",
        causal_inputs,
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "vocab_size": 96,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
    ),
    # encoder-decoders
    "fsmt": encoder_decoder("fsmt", src_vocab_size=96, tgt_vocab_size=96, langs=["en", "de"]),
    # vision
    "levit": vision(
        "levit",
        image_size=64,
        hidden_sizes=[16, 32, 48],
        num_attention_heads=[2, 4, 6],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    "pvt_v2": vision(
        "pvt_v2", image_size=64, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4]
    ),
    "hiera": vision("hiera", image_size=[64, 64], embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]),
    "focalnet": vision(
        "focalnet",
        image_size=32,
        embed_dim=16,
        depths=[1, 1],
        hidden_sizes=[16, 32],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    "swin2sr": vision("swin2sr", image_size=32, embed_dim=16, depths=[2], num_heads=[2], window_size=4),
    "vit_mae": vision("vit_mae", **VISION),
    "videomae": _auto("vision", "videomae", video_inputs, **FRAMES, tubelet_size=2),
    "timesformer": _auto("vision", "timesformer", video_inputs, **FRAMES),
    # speech
    "wav2vec2-conformer": wave("wav2vec2-conformer"),
    "encodec": _auto(
        "speech",
        "encodec",
        sound_inputs,
        num_filters=4,
        hidden_size=16,
        codebook_size=16,
        codebook_dim=16,
        upsampling_ratios=[4, 2],
        num_lstm_layers=1,
    ),
    "vits": _auto(
        "speech",
        "vits",
        character_inputs,
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=64,
        flow_size=16,
        spectrogram_bins=17,
        upsample_initial_channel=32,
    ),
    "moonshine": _auto(
        "speech",
        "moonshine",
        moonshine_inputs,
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    # time series
    "patchtst": _auto(
        "time series",
        "patchtst",
        series_inputs,
        context_length=32,
        patch_length=8,
        patch_stride=8,
        num_input_channels=3,
        d_model=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
    ),
    # texts and images
    "owlvit": _auto(
        "multimodal",
        "owlvit",
        clip_inputs,
        text_config={**TEXT, "max_position_embeddings": 16},
        vision_config=VISION,
        projection_dim=16,
    ),
    "groupvit": _auto(
        "multimodal",
        "groupvit",
        clip_inputs,
        text_config=TEXT,
        vision_config={**VISION, "depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 2]},
        projection_dim=16,
        projection_intermediate_dim=32,
    ),
    "vilt": _auto("multimodal", "vilt", vilt_inputs, **{**TEXT, **VISION}),
}
