"""Programs: grpo (the GRPO job) and serve (a front end over the engines)."""
