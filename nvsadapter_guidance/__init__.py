"""Novel views of an object from one image: Stable Diffusion with the NVS-Adapter, and score distillation with it."""
