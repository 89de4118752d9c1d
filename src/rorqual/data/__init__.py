"""From text to batches of tokens: tokenizers, corpora, packing, and loaders that resume exactly."""
