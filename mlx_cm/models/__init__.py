"""Backbones and their parts, built from configs."""
