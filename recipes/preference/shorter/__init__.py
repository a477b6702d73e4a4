"""Self-play for short replies, with a judge that only looks at the length."""
