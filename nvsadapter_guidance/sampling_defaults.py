"""How many sampling steps and how much guidance suit a family of weights; nothing heavy is imported here."""

STEPS = {"mini": 20, "released": 50}
GUIDANCE_SCALES = {"mini": 2.0, "released": 3.0}
"""Of classifier-free guidance. The embedded model's colours saturate above."""
