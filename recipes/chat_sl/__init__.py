"""Supervised data of chats."""
