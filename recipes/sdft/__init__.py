"""Self-distillation: learn a demonstrated skill, and forget less than with supervised training."""
