"""What lies at a point: encodings, the implicit volume, the background."""

from threedrec.field.background import NeuralEnvironmentMap, SolidBackground
from threedrec.field.encoding import EncodingConfig, build_encoding
from threedrec.field.mlp import MLPConfig, VanillaMLP
from threedrec.field.volume import FieldOutput, ImplicitVolume

__all__ = [
    "EncodingConfig",
    "FieldOutput",
    "ImplicitVolume",
    "MLPConfig",
    "NeuralEnvironmentMap",
    "SolidBackground",
    "VanillaMLP",
    "build_encoding",
]
