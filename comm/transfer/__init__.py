"""Run a transfer plan: weight sources, broadcaster, receiver, the `Landing` interface (both sides)."""
