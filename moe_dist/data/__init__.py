"""Data loading: text corpora, labelled texts, questions and images, and the order of their samples."""
