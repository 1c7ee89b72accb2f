"""Asks questions of checkpoints and results. May import `vlm4vla_core`, never the reverse."""
