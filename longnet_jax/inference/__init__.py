"""What a trained language model writes: caches, prefill, decoding, sampling."""
