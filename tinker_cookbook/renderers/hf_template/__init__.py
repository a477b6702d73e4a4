"""Rendering with a model's own chat template, for models without a renderer in this package."""

from tinker_cookbook.renderers.hf_template.renderer import HFTemplateRenderer

__all__ = ["HFTemplateRenderer"]
