"""The engine process: one `AsyncLLM`, its requests, its side of a sync."""
