"""The `realm` command line: one file a command, `main` puts them together and turns errors into exit statuses."""

from realm_jax.cli.main import main

__all__ = ["main"]
