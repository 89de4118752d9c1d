"""Files of models: Hugging Face directories, safetensors, FP8 blocks, GGUF."""
