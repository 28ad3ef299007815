"""Optimizers for experts, vocabulary rows and dense parameters, combined into one step."""
