"""From a density field to mesh files."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from threedrec.mesh.exporter import MeshExporter, MeshExporterConfig, MeshReport, export_mesh

__all__ = ["MeshExporter", "MeshExporterConfig", "MeshReport", "export_mesh"]


def __getattr__(name: str) -> Any:
    """Import the exporter when it is asked for: the process beside a run needs the shapes, and no PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from threedrec.mesh import exporter

    return getattr(exporter, name)
