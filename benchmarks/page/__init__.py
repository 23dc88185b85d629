"""How pages are made: `markdown` has tables and marks, `results` reads files, `targets` judges, `sections` and `plots`
write docs/performance.md, whose prose is in `performance.md`: its {{words}} become what the sections return.
"""
