"""Optimizers: factored Adam for experts, row-sparse Adam for vocabularies, and one step over everything."""
