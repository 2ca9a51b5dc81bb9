"""Checkpoints of published sizes whose own routers repeat a recorded trace: sizes and routing are real, text is not."""
