"""How a cluster comes up: the local platform, KubeRay manifests and the image. No training logic."""
