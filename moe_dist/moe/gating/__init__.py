"""Gates, one file per paper: each chooses a token's experts, and moves no rows.

`moe.interfaces.Gate` is a gate's interface. A model builds its gate in `build_moe`
(`models.lstm_lm`, `models.transformer`) from a section in `config.schema`, with
ranges in `config.validate`.
"""
