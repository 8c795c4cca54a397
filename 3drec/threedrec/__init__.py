"""One photograph in, a textured mesh out."""

__version__ = "0.1.0"
