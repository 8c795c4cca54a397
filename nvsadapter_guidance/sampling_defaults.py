"""How many sampling steps and how much guidance suit a family of weights; nothing heavy is imported here."""

STEPS = {"mini": 20, "released": 50}
GUIDANCE_SCALES = {"mini": 1.0, "released": 3.0}
"""Of classifier-free guidance. The embedded model starts from little noise and is best without guidance, in half of the
time."""
