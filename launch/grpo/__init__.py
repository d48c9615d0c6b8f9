"""The GRPO job (`python -m rollcast.launch.grpo`, every rank)."""
