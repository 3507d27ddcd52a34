"""Compressed models as ONNX files."""

from .onnx import export_onnx


__all__ = ["export_onnx"]
