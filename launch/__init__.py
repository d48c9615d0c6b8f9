"""Programs to start: the GRPO job, and what it shows and records."""
