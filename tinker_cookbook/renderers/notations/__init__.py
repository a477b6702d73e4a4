"""How tool declarations and tool calls are written and read: one module per notation."""
