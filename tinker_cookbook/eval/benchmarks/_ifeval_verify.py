"""The instruction checks under the module name of the original cookbook."""

from tinker_cookbook.eval.graders.instructions import verify_all_instructions, verify_instruction

__all__ = ["verify_all_instructions", "verify_instruction"]
