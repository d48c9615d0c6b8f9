"""A tiny model that takes part in chats."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rollcast.launch.grpo.task import CHARACTERS
from rollcast.launch.grpo.tiny_model import character_tokenizer, write_tiny_model

TEMPLATE = "{% for message in messages %}{{ message['content'] or '' }}>{% endfor %}{{ ending or '' }}"


def write_chat_model(folder: Path, *, characters: str = CHARACTERS) -> None:
    """Write the tiny model with a template: every message, ">" behind each, and the template's argument `ending`."""
    write_tiny_model(folder, characters=characters, seed=5)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_tokenizer(folder: Path, *, characters: str) -> None:
    """Write a tokenizer with this template, one token for each character, beside a model of any kind."""
    tokenizer: Any = character_tokenizer(characters)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
