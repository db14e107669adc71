"""TensorRT on a GPU: the driver, its memory, engines and what runs them."""
