"""Sends megatron-core's tensor-parallel GPT layers as Holdings, as the documentation has it (torchrun, two ranks).

What arrives is compared with what Megatron's own modules compute of unit vectors, gathered by Megatron, and with
transformers: a Llama with these weights computes what Megatron's model computes.
"""

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from examples import example
from torch import distributed as dist
from torch.nn import functional
from trainer_job import TrainerJob
from transformers import LlamaConfig, LlamaForCausalLM

from rollcast.comm import Holding, WeightSource

warnings.simplefilter("ignore")
# What only GPUs have, and Megatron asks for on CPU, too.
torch.cuda.current_device = lambda: "cpu"  # pyright: ignore[reportAttributeAccessIssue]

from megatron.core import parallel_state, tensor_parallel  # noqa: E402  # pyright: ignore[reportMissingImports]
from megatron.core.models.gpt import GPTModel  # noqa: E402  # pyright: ignore[reportMissingImports]
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402  # pyright: ignore[reportMissingImports]
from megatron.core.transformer import TransformerConfig  # noqa: E402  # pyright: ignore[reportMissingImports]

LAYERS, HIDDEN, HEADS, GROUPS, HEAD_DIM, FFN = 2, 32, 8, 4, 16, 48
# Megatron pads the vocabulary.
VOCABULARY, PADDED = 50, 64
IDS = torch.tensor([[3, 49, 7, 31, 32, 33, 1, 0]])
Weights = dict[str, torch.Tensor]


def main() -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    torch.manual_seed(3)
    tensor_parallel.random.get_cuda_rng_tracker().fork = nullcontext
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    source = WeightSource(holdings(model))
    assert source.stable_params() is not None
    job = TrainerJob(source)
    assert {held.spec.name for held in source.statement} == set(llama().state_dict())
    for _ in range(3):
        landed, expected, logits = job.sync(), gathered(model), gather(forward(model).detach())
        if job.rank == 0:
            assert landed.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(landed[name], tensor), name
            torch.testing.assert_close(llama(landed)(IDS).logits, logits[..., :VOCABULARY], rtol=1e-4, atol=1e-5)
        forward(model).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    job.close()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build() -> Any:
    """Return Megatron's model: grouped queries, SwiGLU, RMSNorm, rotary positions."""
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        ffn_hidden_size=FFN,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=2,
        init_method_std=0.2,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=PADDED,
        max_sequence_length=32,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def llama(weights: Weights | None = None) -> Any:
    """Return transformers' model of the same sizes."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            head_dim=HEAD_DIM,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    )
    if weights is not None:
        model.load_state_dict(weights)
    return model


def forward(model: Any) -> torch.Tensor:
    """Return this rank's columns of the logits."""
    size = IDS.shape[1]
    masked = torch.ones(1, 1, size, size).tril() == 0
    return model(IDS, torch.arange(size)[None], masked)


def holdings(model: Any) -> dict[str, Any]:
    """Return what this rank holds of each parameter of the checkpoint."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    qkv_holdings, gate_up_holdings = example("qkv", "qkv_holdings"), example("gate_up", "gate_up_holdings")
    sizes = {"heads": HEADS, "groups": GROUPS, "head_dim": HEAD_DIM, "hidden": HIDDEN}
    vocabulary_holding = example("vocabulary", "vocabulary_holding")
    state: dict[str, Any] = {
        "model.embed_tokens.weight": vocabulary_holding(
            model.embedding.word_embeddings.weight, rank=rank, vocabulary=VOCABULARY
        ),
        "model.norm.weight": model.decoder.final_layernorm.weight,
        "lm_head.weight": vocabulary_holding(model.output_layer.weight, rank=rank, vocabulary=VOCABULARY),
    }
    for number, layer in enumerate(model.decoder.layers):
        name, attention, mlp = f"model.layers.{number}", layer.self_attention, layer.mlp
        state |= qkv_holdings(f"{name}.self_attn", attention.linear_qkv.weight, rank=rank, ranks=2, **sizes)
        state |= gate_up_holdings(f"{name}.mlp", mlp.linear_fc1.weight, rank=rank, ranks=2)
        state[f"{name}.self_attn.o_proj.weight"] = columns(attention.linear_proj.weight, rank)
        state[f"{name}.mlp.down_proj.weight"] = columns(mlp.linear_fc2.weight, rank)
        state[f"{name}.input_layernorm.weight"] = layer.input_layernorm.weight
        state[f"{name}.post_attention_layernorm.weight"] = layer.pre_mlp_layernorm.weight
    return state


def columns(weight: torch.Tensor, rank: int) -> Holding:
    return Holding(weight, shape=(weight.shape[0], 2 * weight.shape[1]), start=(0, rank * weight.shape[1]))


@torch.no_grad()
def gathered(model: Any) -> Weights:
    """Return the checkpoint's weights, by Megatron's own modules and collectives. Collective."""
    unit = torch.eye(HIDDEN)[:, None]
    weights: Weights = {
        "model.embed_tokens.weight": gather(model.embedding.word_embeddings.weight.T).T[:VOCABULARY],
        "model.norm.weight": model.decoder.final_layernorm.weight.clone(),
        "lm_head.weight": gather(model.output_layer.weight.T).T[:VOCABULARY],
    }
    for number, layer in enumerate(model.decoder.layers):
        name, attention, mlp = f"model.layers.{number}", layer.self_attention, layer.mlp
        parts = dict(zip("qkv", attention.get_query_key_value_tensors(unit), strict=False))
        outputs = {f"self_attn.{part}_proj": each.flatten(2) for part, each in parts.items()}
        outputs |= dict(zip(("mlp.gate_proj", "mlp.up_proj"), mlp.linear_fc1(unit)[0].chunk(2, dim=-1), strict=True))
        weights |= {f"{name}.{part}.weight": gather(each)[:, 0].T for part, each in outputs.items()}
        weights[f"{name}.self_attn.o_proj.weight"] = gather(attention.linear_proj.weight)
        weights[f"{name}.mlp.down_proj.weight"] = gather(mlp.linear_fc2.weight)
        weights[f"{name}.input_layernorm.weight"] = layer.input_layernorm.weight.clone()
        weights[f"{name}.post_attention_layernorm.weight"] = layer.pre_mlp_layernorm.weight.clone()
    return weights


def gather(part: torch.Tensor) -> torch.Tensor:
    """Return both ranks' columns. Collective."""
    return tensor_parallel.gather_from_tensor_model_parallel_region(part.contiguous())


if __name__ == "__main__":
    main()
