"""A pool that serves the OpenAI API (`python -m rollcast.launch.serve`, every rank)."""
