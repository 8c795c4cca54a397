"""Training: data, and the stages that turn it into an embedded model."""
