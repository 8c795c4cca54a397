"""Sources of training meshes with clear permissive or Creative Commons licences, and their conversion to ``.glb``."""
