"""Everything that trainers, engines and workers say to each other (all processes)."""
