"""What travels on which lane: frozen data and pure functions, the same on both sides."""
