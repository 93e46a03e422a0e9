"""GGUF, the file format of llama.cpp: one file with weights, sizes and tokenizer."""

from ghostssm.checkpoint.gguf.writing import ExportedGGUF, NumberFormat, export_gguf

__all__ = ["ExportedGGUF", "NumberFormat", "export_gguf"]
