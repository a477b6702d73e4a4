"""LiteLLM calls Tinker models."""
