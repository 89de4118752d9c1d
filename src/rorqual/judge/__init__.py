"""Whether an answer is right: one judge for rewards and evaluations."""
