"""Tokenizers, corpora, chat data, packing, and data loaders that resume exactly."""
