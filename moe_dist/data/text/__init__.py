"""Text data: corpora, tokenizers, and the samples of each text task."""
