"""Data loading: text corpora, labelled texts, questions, images, and their sample order."""
