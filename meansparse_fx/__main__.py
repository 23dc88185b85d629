"""Floor 6: ``python -m meansparse_fx`` is the command line."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="meansparse-fx")
