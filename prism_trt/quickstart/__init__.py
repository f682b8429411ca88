"""From nothing to a served, measured model in a few minutes on a CPU."""
