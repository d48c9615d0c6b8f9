"""Tiny random models of many architectures. A new one is one line in `ARCHITECTURES`."""

import copy
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

Settings = dict[str, Any]

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2}
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
COMMON = SIZES | TOKENS | {"intermediate_size": 96, "max_position_embeddings": 128}
COMMON |= {"num_attention_heads": 2, "num_key_value_heads": 2}
GROUPED = COMMON | {"num_attention_heads": 4, "head_dim": 32}
GPT = TOKENS | {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
TIED = {"tie_word_embeddings": True}
TWO_LAYERS = ["sliding_attention", "full_attention"]

TWO_OF_FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
EXPERTS = TWO_OF_FOUR | {"moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED_EXPERT = EXPERTS | {"shared_expert_intermediate_size": 32}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
AFMOE = {"num_dense_layers": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1}
AFMOE |= {"score_func": "sigmoid", "route_norm": True}
ERNIE_MOE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1}
LLAMA4 = LOCAL_EXPERTS | {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 2}
MINIMAX = LOCAL_EXPERTS | {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True}
LFM2 = {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}

MLA = COMMON | {"q_lora_rank": 32, "kv_lora_rank": 32}
MLA |= {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
MAMBA = SIZES | {"state_size": 8}
MAMBA2 = SIZES | {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2}
SSM = {"mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16}
MAMBA_FIRST = {"layer_types": ["mamba", "attention"]}
JAMBA = TWO_OF_FOUR | {"mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False}
JAMBA |= {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
NEMOTRON_H = {"layers_block_type": ["linear_attention", "full_attention", "mlp"], "n_groups": 2}
NEMOTRON_H |= {"ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16}
ZAMBA2 = {"layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1], "adapter_rank": 8}
ZAMBA2 |= {"mamba_d_state": 16, "n_mamba_heads": 8, "mamba_headdim": 16}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
LINEAR |= {"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
PER_LAYER = {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "layer_types": TWO_LAYERS}
GEMMA3N = PER_LAYER | {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]}

# name: transformers' config class, its settings
ARCHITECTURES: dict[str, tuple[str, Settings]] = {
    "afmoe": ("AfmoeConfig", GROUPED | EXPERTS | AFMOE),
    "apertus": ("ApertusConfig", COMMON),
    "arcee": ("ArceeConfig", GROUPED),
    "bloom": ("BloomConfig", SIZES | {"n_head": 2}),
    "cohere": ("CohereConfig", COMMON),
    "cohere2": ("Cohere2Config", COMMON | {"sliding_window": 32}),
    "deepseek_v2": ("DeepseekV2Config", MLA | ROUTED | {"q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3Config", MLA | ROUTED | {"topk_method": "noaux_tc"}),
    "dots1": ("Dots1Config", COMMON | ROUTED),
    "ernie4_5": ("Ernie4_5Config", GROUPED),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", COMMON | ERNIE_MOE),
    "exaone4": ("Exaone4Config", GROUPED),
    "exaone_moe": ("ExaoneMoeConfig", GROUPED | EXPERTS | {"layer_types": TWO_LAYERS, "first_k_dense_replace": 1}),
    "falcon": ("FalconConfig", SIZES | {"num_attention_heads": 2}),
    "falcon_h1": ("FalconH1Config", COMMON | SSM | {"mamba_d_ssm": 128}),
    "falcon_mamba": ("FalconMambaConfig", MAMBA),
    "flex_olmo": ("FlexOlmoConfig", COMMON | TWO_OF_FOUR),
    "gemma": ("GemmaConfig", GROUPED),
    "gemma2": ("Gemma2Config", GROUPED),
    "gemma3": ("Gemma3TextConfig", GROUPED),
    "gemma3n": ("Gemma3nTextConfig", GROUPED | GEMMA3N),
    "gemma4": ("Gemma4TextConfig", GROUPED | PER_LAYER | {"global_head_dim": 32}),
    "glm4": ("Glm4Config", GROUPED),
    "glm4_moe": ("Glm4MoeConfig", GROUPED | ROUTED),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", MLA | ROUTED),
    "gpt2": ("GPT2Config", GPT),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT),
    "gpt_neox": ("GPTNeoXConfig", COMMON),
    "gpt_oss": ("GptOssConfig", GROUPED | LOCAL_EXPERTS | {"intermediate_size": 128}),
    "gptj": ("GPTJConfig", GPT | {"rotary_dim": 16}),
    "granite": ("GraniteConfig", COMMON),
    "granitemoe": ("GraniteMoeConfig", COMMON | LOCAL_EXPERTS),
    "granitemoehybrid": ("GraniteMoeHybridConfig", COMMON | LOCAL_EXPERTS | SSM | MAMBA_FIRST),
    "granitemoeshared": ("GraniteMoeSharedConfig", COMMON | LOCAL_EXPERTS | {"shared_intermediate_size": 32}),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", GROUPED),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", GROUPED | {"num_experts": 4, "moe_topk": 2}),
    "hyperclovax": ("HyperCLOVAXConfig", GROUPED),
    "jamba": ("JambaConfig", COMMON | JAMBA),
    "lfm2_moe": ("Lfm2MoeConfig", COMMON | EXPERTS | LFM2),
    "llama": ("LlamaConfig", GROUPED),
    "llama-tied": ("LlamaConfig", GROUPED | TIED),
    "llama4": ("Llama4TextConfig", GROUPED | LLAMA4),
    "mamba": ("MambaConfig", MAMBA),
    "mamba2": ("Mamba2Config", MAMBA2),
    "minicpm3": ("MiniCPM3Config", MLA),
    "minimax_m2": ("MiniMaxM2Config", GROUPED | MINIMAX),
    "mistral-sliding": ("MistralConfig", GROUPED | {"sliding_window": 32}),
    "mixtral": ("MixtralConfig", GROUPED | LOCAL_EXPERTS),
    "nemotron": ("NemotronConfig", GROUPED),
    "nemotron_h": ("NemotronHConfig", GROUPED | NEMOTRON_H),
    "olmo2": ("Olmo2Config", COMMON),
    "olmo3": ("Olmo3Config", COMMON),
    "olmoe": ("OlmoeConfig", COMMON | TWO_OF_FOUR),
    "opt": ("OPTConfig", COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "persimmon": ("PersimmonConfig", COMMON),
    "phi": ("PhiConfig", COMMON),
    "phi3-fused": ("Phi3Config", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen2_moe": ("Qwen2MoeConfig", GROUPED | SHARED_EXPERT),
    "qwen3": ("Qwen3Config", GROUPED),
    "qwen3-tied": ("Qwen3Config", GROUPED | TIED),
    "qwen3_moe": ("Qwen3MoeConfig", GROUPED | EXPERTS),
    "qwen3_next": ("Qwen3NextConfig", GROUPED | SHARED_EXPERT | LINEAR),
    "seed_oss": ("SeedOssConfig", GROUPED),
    "smollm3": ("SmolLM3Config", COMMON),
    "stablelm": ("StableLmConfig", COMMON),
    "starcoder2": ("Starcoder2Config", COMMON),
    "zamba2": ("Zamba2Config", COMMON | ZAMBA2),
}
IDS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 56, "patch_size": 14}
QWEN_TOWER = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 64}
QWEN_TOWER |= {"patch_size": 16, "num_position_embeddings": 64}
MROPE = {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 10000.0}
MROPE_PART = MROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
GEMMA3_IDS = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, "mm_tokens_per_image": 4}
LLAMA_TEXT = GROUPED | {"model_type": "llama"}

# Models with images: transformers' config class, its settings.
IMAGES: dict[str, tuple[str, Settings]] = {
    "gemma3-images": ("Gemma3Config", GEMMA3_IDS | {"text_config": GROUPED, "vision_config": TOWER}),
    "llava": (
        "LlavaConfig",
        {"text_config": LLAMA_TEXT, "vision_config": TOWER | {"model_type": "clip_vision_model"}}
        | {"image_token_index": 90, "vision_feature_layer": -1},
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        IDS
        | {"text_config": GROUPED | {"rope_parameters": MROPE}}
        | {"vision_config": QWEN_TOWER | {"deepstack_visual_indexes": [0]}},
    ),
    "qwen3_5-images": (
        "Qwen3_5Config",
        IDS | {"text_config": GROUPED | LINEAR | {"rope_parameters": MROPE_PART}, "vision_config": QWEN_TOWER},
    ),
}
# What published checkpoints of them have in their names, and transformers' models have no longer.
TOWER_LEVEL = re.compile(r"^vision_tower\.(?!vision_model)")
PUBLISHED = {"gemma3-images", "llava"}
MOE = "qwen3_moe"
# Whose names in memory are not those of their checkpoints.
CONVERTED = ["afmoe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe"]
CONVERTED += ["glm4_moe_lite", "granitemoe", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "jamba"]
CONVERTED += ["lfm2_moe", "minimax_m2", "mixtral", "nemotron_h", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"]

# Those that are landed on two ranks, too.
SHARDED = [
    "apertus",
    "bloom",
    "deepseek_v2",
    "deepseek_v3",
    "falcon",
    "falcon_h1",
    "gemma3",
    "glm4_moe",
    "gpt2",
    "gpt_oss",
    "granitemoehybrid",
    "jamba",
    "llama",
    "llama-tied",
    "mamba",
    "mamba2",
    "minicpm3",
    "minimax_m2",
    "mixtral",
    "phi3-fused",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "zamba2",
]
# "+ep": expert parallel. "+memory": what is made of the model in memory, not what its checkpoint has.
FURTHER = [
    "deepseek_v3@2+ep",
    "llama4@2+ep",
    "qwen3_moe@2+ep",
    "qwen3_moe@2+ep+memory",
    "qwen3_moe@2+memory",
    *(f"{name}+memory" for name in (*CONVERTED, *IMAGES, "gpt_oss")),
]
# Forward passes that vLLM cannot make on CPUs.
NOT_USED = frozenset({"llama4", "minimax_m2"})
# "+bf16", "+fp16": engine, checkpoint and trainer in that dtype, but for what checkpoints keep in float32.
# "+masters": the trainer has everything in float32.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Ends of the names of what checkpoints of models in half precision keep in float32.
FLOAT32_ISLANDS = ("e_score_correction_bias", "expert_bias", "A_log", "dt_bias", ".D")
# Some of vLLM's routers are float32, whatever the checkpoint has.
ROUTERS = (".gate.weight",)
HALF = [
    *(f"{name}+bf16" for name in ARCHITECTURES),
    *(f"{name}@2+bf16" for name in SHARDED),
    *(f"{name}+fp16" for name in ("bloom", "deepseek_v3", "gpt2", "llama", "mamba2", "qwen3_moe", "qwen3_next")),
    *(f"{name}+bf16+masters" for name in ("deepseek_v3", "falcon_h1", "glm4_moe", "jamba", "llama", "mamba", "mamba2")),
    *(f"{name}+bf16+masters" for name in ("nemotron_h", "qwen3_moe", "qwen3_next", "zamba2")),
    "glm4_moe+bf16+memory",
    "qwen3_moe@2+ep+bf16",
    "qwen3_next@2+bf16+masters",
]
# What cannot be expressed, or is unknown to vLLM's loader, and how it is refused.
REFUSED = {
    "phi": r"does not take parameter lm_head\.bias \[96\] \w+: the loader copies a weight into a tensor of its own",
}
REFUSED |= {"phi+bf16": REFUSED["phi"]}
CASES = [*ARCHITECTURES, *(f"{name}@2" for name in SHARDED), *FURTHER, *HALF]
CASES += [case for case in REFUSED if case not in CASES]


def build(name: str, *, seed: int) -> Any:
    """Return a random float32 model."""
    torch.manual_seed(seed)
    config_class, settings = (ARCHITECTURES | IMAGES)[name]
    config = getattr(transformers, config_class)(**copy.deepcopy(settings))
    kind = transformers.AutoModelForImageTextToText if name in IMAGES else transformers.AutoModelForCausalLM
    return kind.from_config(config).float()


def save(name: str, model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Save a model of this architecture as it would be published, and return the tensors."""
    model.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = load_file(file)
        if name in PUBLISHED:
            loaded = {TOWER_LEVEL.sub("vision_tower.vision_model.", key): tensor for key, tensor in loaded.items()}
            save_file(loaded, file, metadata={"format": "pt"})
        tensors |= loaded
    return tensors


def in_half(model: Any, dtype: torch.dtype, *, kept: tuple[str, ...] = FLOAT32_ISLANDS) -> Any:
    """Cast the model, in place, but for names that end in one of `kept`. Return it."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not name.endswith(kept):
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    return model


def perturb(model: torch.nn.Module) -> None:
    """Change every element of every parameter, and of every buffer that is saved."""
    with torch.no_grad():
        for tensor in {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values():
            if tensor.is_floating_point():
                tensor.mul_(1.01).add_(torch.randn_like(tensor), alpha=0.01)
