"""Text: files, tokens, vocabularies and samples."""
