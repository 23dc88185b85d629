"""The paper's experiments in small, on Fashion-MNIST, each with the column the paper lacks: the identity backward.

`tables` says what is measured, `measure` does it, `published` holds the paper's own numbers, `page` puts both side by
side in docs/paper.md.
"""
