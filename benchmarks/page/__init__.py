"""How pages are made: each is a template for Jinja, prose and tables, which `markdown` renders. For docs/performance.md
`results` reads the files, `targets` judges them, `sections` has what the template calls, and `plots` draws.
"""
