"""Geometry without training: meshes in, voxels, symmetries, surfaces and pictures out."""
