"""Answer extraction and equivalence: one judge for rewards and evaluations."""
