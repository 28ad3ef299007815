"""Gates: they choose each token's experts, and move nothing. A file per paper.

`moe.interfaces.Gate` is the interface of a gate. A model builds its gate in `build_moe`
(`models.lstm_lm`, `models.transformer`) from a section of `config.schema`.
"""
