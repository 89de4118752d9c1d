"""Low-rank adapters (LoRA) of a built model: trained, kept in peft's files, merged, or served several at a time."""
