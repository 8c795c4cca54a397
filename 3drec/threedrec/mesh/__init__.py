"""From a density field to mesh files."""

from threedrec.mesh.exporter import MeshExporter, MeshExporterConfig, MeshReport, export_mesh

__all__ = ["MeshExporter", "MeshExporterConfig", "MeshReport", "export_mesh"]
