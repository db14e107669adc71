"""What a board runs: numpy and one backend, never torch, transformers or onnx."""
