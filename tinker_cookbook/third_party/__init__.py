"""Connections to the interfaces of other software."""
