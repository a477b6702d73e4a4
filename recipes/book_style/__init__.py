"""Teach a model the style of a book; see `python -m recipes.book_style --help`."""
