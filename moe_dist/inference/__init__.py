"""Uses a trained run: generates text, classifies images and sentences."""
