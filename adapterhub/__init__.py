"""What an adapter is, where it lives and how it travels. Importing this loads no torch."""

__version__ = "0.1.0"
