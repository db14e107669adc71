"""Pruning methods: pure, traceable torch functions that know no model and no ONNX."""
