"""How docs/performance.md is made: `results` reads files, `targets` judges, `sections` writes tables, `plots` draws.

The prose is in `performance.md`, whose {{words}} become what the sections return.
"""
