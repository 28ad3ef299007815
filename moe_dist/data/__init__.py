"""Reads text and images, and cuts them into samples."""
