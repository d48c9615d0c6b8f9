"""A tiny Qwen3-shaped model with random weights, and its character tokenizer (trainer rank 0 writes it once)."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def tiny_config(vocab_size: int) -> Qwen3Config:
    """Return the config: two layers of 64, about 0.1 M parameters, untied embeddings, float32."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        # Larger than usual: with 0.02, so small a model starts too close to uniform to learn by reward alone.
        initializer_range=0.06,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        dtype=torch.float32,
    )


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each character."""
    vocabulary = {token: index for index, token in enumerate((PAD, EOS, UNKNOWN, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


def write_tiny_model(folder: Path, *, characters: str, seed: int) -> None:
    """Save a freshly initialised model and its tokenizer as a Hugging Face folder."""
    tokenizer = character_tokenizer(characters)
    torch.manual_seed(seed)
    Qwen3ForCausalLM(tiny_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
