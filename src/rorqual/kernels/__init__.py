"""Functions the model calls that have, or may have, a faster form; each with a plain reference beside it."""
