"""vLLM's own OpenAI-compatible server inside the engine process, taking part in syncs."""
