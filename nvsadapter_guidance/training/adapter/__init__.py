"""Training of the adapter beside a frozen base model, as NVS-Adapter (ECCV 2024) was trained."""
