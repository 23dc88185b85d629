"""How pages are made: each is a template for Jinja, prose and tables, which `markdown` renders, from the files that
`results` reads. For docs/performance.md `targets` judges them, `speed` has what the template calls and draws; `paper`
has the same for docs/paper.md.
"""
