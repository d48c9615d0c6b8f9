"""The latency benchmark: how long a sync takes, by every method (see sync_latency.py)."""
